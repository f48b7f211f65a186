"""Tests of the page over many runs."""
