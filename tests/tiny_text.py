"""Settings of language models and translation that train in a second."""

TINY_MODEL = [
    "debug=two_updates", "model.embed_dim=16", "model.ffn_dim=16", "model.num_heads=2",
    "data.vocabulary_size=300",
]  # fmt: skip
TINY_LANGUAGE_MODEL = [
    *TINY_MODEL, "model.depth=1", "data=text_files", "data.block_size=8", "data.context_window=4",
]  # fmt: skip
TINY_TRANSLATION = [
    *TINY_MODEL, "model.encoder_depth=1", "model.decoder_depth=1", "trainer.batch_size=256",
    "decoding.beam=2", "decoding.max_len_a=0", "decoding.max_len_b=3",
]  # fmt: skip
