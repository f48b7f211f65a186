"""fedkn from Python, and what the commands call: how runs begin, and what comes of them."""
