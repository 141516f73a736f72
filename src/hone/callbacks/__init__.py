"""What happens beside a run's steps."""
