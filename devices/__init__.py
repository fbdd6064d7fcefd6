"""Boards, how to reach them, and how latency is measured on them."""
