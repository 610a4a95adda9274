"""What every training here needs: an optimizer, state to resume from, and worker processes."""
