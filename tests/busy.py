"""Runs until its standard input ends."""

import sys

sys.stdin.read()
