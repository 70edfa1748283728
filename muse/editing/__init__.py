"""Pictures changed under a prompt (§3.3): `regions` holds the geometry, `holes` and `whole` what is done with it."""
