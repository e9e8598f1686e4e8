#!/usr/bin/env bash
# Stands in for a remote shell where all "hosts" are this machine: bash launch/submit/here.sh HOST LINE
exec bash -c "$2"
