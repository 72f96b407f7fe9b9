"""What agent, controller and simulator share. Imports nothing of ours."""
