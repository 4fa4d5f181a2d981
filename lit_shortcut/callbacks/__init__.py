"""What happens beside a task: averages, recording, sampling, result rows."""
