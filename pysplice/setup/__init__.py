"""What runs once, before the loop: namespaces, the tap, its addresses, and giving up privileges."""
