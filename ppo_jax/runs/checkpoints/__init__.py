"""What a run can go on from: states saved whole, checked, and found again."""
