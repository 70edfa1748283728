#!/bin/sh
# Prints a Python that can make the virtual environment: 3.11 to 3.13 with the venv module. Says in one line what is
# missing otherwise.
found=
for name in python3 python3.13 python3.12 python3.11; do
    command -v "$name" >/dev/null 2>&1 || continue
    "$name" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' 2>/dev/null || continue
    found=$name
    if "$name" -c 'import ensurepip, venv' 2>/dev/null; then
        echo "$name"
        exit 0
    fi
done
if [ -n "$found" ]; then
    echo "error: the venv module of $found is missing: apt-get install python3-venv" >&2
else
    echo 'error: no python3 of version 3.11 to 3.13 was found: apt-get install python3 python3-venv' >&2
fi
exit 2
