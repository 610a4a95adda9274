"""What any training here needs: an optimizer, states that resume, worker processes."""
