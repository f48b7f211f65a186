"""Many runs on one page: published tables that were run again, and comparisons."""
