#!/usr/bin/env bash
# Stands in for a remote shell where all "hosts" are this machine: bash launch/submit/here.sh HOST LINE
# As a remote shell does, it passes on none of the caller's environment.
exec env -i HOME="$HOME" PATH="$PATH" bash -c "$2"
