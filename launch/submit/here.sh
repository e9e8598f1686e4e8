#!/usr/bin/env bash
# Replaces a remote shell if all "hosts" are this machine: bash launch/submit/here.sh HOST LINE
# Like a remote shell, it does not pass on the caller's environment.
exec env -i HOME="$HOME" PATH="$PATH" bash -c "$2"
