"""The join of history and live for one followed log: pure, without I/O."""
