"""The ways bytes travel between client and daemon. One file a transport; ``base`` says what each can do."""
