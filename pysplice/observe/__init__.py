"""Windows on the proxy, not doors: they look, and never change anything."""
