"""What stands beside Start: findings and a recommendation, from facts alone. No file, no page; only `device` sees the machine."""
