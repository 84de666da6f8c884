"""Wall (Tilde Research, 2026): softmax attention whose keys fade by forget gates of each head and channel, without positions."""
