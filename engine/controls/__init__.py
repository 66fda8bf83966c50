"""What operators hold, drop, pause and throttle: one document in the control bucket, which every process watches."""
