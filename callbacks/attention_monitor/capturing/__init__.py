"""A running model -> one ``AttentionCall`` for each attention call."""
