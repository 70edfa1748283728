"""Many pictures from the shell: `rows` and `plan` say what, `stores` where to, `run` does it and can be killed."""
