"""What a run tells about itself: metrics, times, memory, progress."""
