"""Make a random Llama with a byte-level tokenizer: ``llama.py TARGET.gguf [WIDTH [BLOCKS]]``."""

from __future__ import annotations

import sys

import gguf
import numpy as np

VOCABULARY = 320


def main(path: str, width: int = 64, blocks: int = 1) -> None:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(128)
    writer.add_embedding_length(width)
    writer.add_block_count(blocks)
    writer.add_feed_forward_length(2 * width)
    writer.add_head_count(4)
    writer.add_head_count_kv(4)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(width // 4)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(VOCABULARY)
    writer.add_file_type(0)
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = iter(range(256, 512))
    words = [chr(byte if byte in shown else next(hidden)) for byte in range(256)] + ["ab"]
    special = [f"<|{number}|>" for number in range(len(words), VOCABULARY)]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("llama-bpe")
    writer.add_token_list(words + special)
    writer.add_token_merges(["a b"])
    writer.add_token_types([1] * len(words) + [3] * len(special))
    writer.add_bos_token_id(VOCABULARY - 2)
    writer.add_eos_token_id(VOCABULARY - 1)
    writer.add_pad_token_id(VOCABULARY - 3)
    writer.add_chat_template("{{ messages[0]['content'] }}")
    chance = np.random.default_rng(0)
    made = {
        (kind, *shape): (chance.standard_normal(shape, np.float32) * 0.1).astype(kind)
        for kind, *shape in (
            (np.float32, width),
            (np.float16, VOCABULARY, width),
            (np.float16, width, width),
            (np.float16, 2 * width, width),
            (np.float16, width, 2 * width),
        )
    }

    def tensor(name: str, *shape: int) -> None:
        kind = np.float16 if len(shape) > 1 else np.float32
        writer.add_tensor(f"{name}.weight", made[kind, *shape])

    tensor("token_embd", VOCABULARY, width)
    tensor("output_norm", width)
    tensor("output", VOCABULARY, width)
    for block in range(blocks):
        for name in ("attn_norm", "ffn_norm"):
            tensor(f"blk.{block}.{name}", width)
        for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
            tensor(f"blk.{block}.{name}", width, width)
        for name in ("ffn_gate", "ffn_up"):
            tensor(f"blk.{block}.{name}", 2 * width, width)
        tensor(f"blk.{block}.ffn_down", width, 2 * width)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
