"""Wall (Tilde Research, 2026): softmax attention whose keys fade by gates of each head and channel, without positions."""
