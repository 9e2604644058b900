"""Rewards from rules: answers verified in killable processes, and T1's penalties for bad patterns."""
