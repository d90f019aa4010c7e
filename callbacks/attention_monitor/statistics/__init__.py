"""AttentionCall -> numbers of heads, in blocks of query rows."""
