"""What a user reads: coupling, report, feasibility, sensitivity."""
