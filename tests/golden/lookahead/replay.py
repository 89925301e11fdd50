"""Lookahead decoding: the authors' pool, mask and whole greedy runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch

from prunelab.common.core.budget import Budget
from prunelab.common.speculative import Reader, Session
from prunelab.common.speculative.role import Step
from prunelab.common.speculative.trees import Accepted, DraftTree
from prunelab.methods.lookahead.method import Lookahead, Pool, diagonals, window


def replay(case: str, inputs: Mapping[str, np.ndarray], wanted: Sequence[str]) -> dict[str, np.ndarray]:
    return {"pool": pools, "mask": mask, "decode": run}[case.split("_")[0]](inputs)


def listed(pool: Pool, suffix: str = "") -> dict[str, np.ndarray]:
    rows = [(key, gram) for key in pool.grams for gram in pool.behind(key)]
    return {
        f"out_pool_keys{suffix}": np.array([key for key, _ in rows]),
        f"out_pool_ngrams{suffix}": np.array([gram for _, gram in rows]),
    }


def pools(inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    size, pool = int(inputs["hp_level"]), Pool(int(inputs["hp_guess_set_size"]))
    pool.add_text(inputs["in_prompt"].tolist(), size)
    filled = listed(pool, "_after_prompt")
    for number, rows in enumerate(torch.from_numpy(inputs["in_window"])):
        root = torch.from_numpy(inputs["in_last_token"][number : number + 1])
        for key, *gram in diagonals(
            root, [rows[0, :-1], *rows[1:]], torch.from_numpy(inputs["in_new_results"][number])
        ):
            pool.add(key, gram)
        pool.add_text(inputs["in_generated"][number].tolist(), size)
    return filled | listed(pool)


def mask(inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The current token, the window and then the guesses, each of which the authors read to its last token."""
    levels = [torch.zeros(size, dtype=torch.long) for size in inputs["hp_level_sizes"].tolist()]
    length, guesses, past = int(inputs["hp_level"]) - 1, int(inputs["hp_num_guesses"]), int(inputs["hp_past"])
    chain = DraftTree(torch.zeros(length, dtype=torch.long), torch.arange(length) - 1)
    tree = window(levels)
    for _ in range(guesses):
        tree = tree.beside(chain)
    count = 1 + len(tree.tokens)
    visible = torch.zeros(count, past + count, dtype=torch.bool)
    visible[:, : past + 1] = True
    visible[1:, past + 1 :] = tree.ancestors
    return {"out_visible": visible.numpy()}


def llama(inputs: Mapping[str, np.ndarray]):
    from transformers import LlamaConfig, LlamaForCausalLM

    weights = {n[6:].replace("__", "."): torch.from_numpy(a) for n, a in inputs.items() if n.startswith("in_sd_")}
    heads, embedding = int(inputs["hp_num_heads"]), weights["model.embed_tokens.weight"]
    keys = weights["model.layers.0.self_attn.k_proj.weight"]
    config = LlamaConfig(
        vocab_size=embedding.shape[0],
        hidden_size=embedding.shape[1],
        num_hidden_layers=1 + max(int(n.split(".")[2]) for n in weights if n.startswith("model.layers.")),
        num_attention_heads=heads,
        num_key_value_heads=keys.shape[0] * heads // embedding.shape[1],
        intermediate_size=len(weights["model.layers.0.mlp.gate_proj.weight"]),
        max_position_embeddings=512,
        bos_token_id=None,
        eos_token_id=int(inputs["hp_eos_token_id"]),
        rms_norm_eps=float(inputs["hp_rms_norm_eps"]),
    )
    model = LlamaForCausalLM(config).eval()
    model.load_state_dict(weights)
    return model


def released(step: Step) -> Step:
    """The step as the authors note it down: with the last accepted token in the place of each."""
    tokens = step.accepted.tokens
    return replace(step, accepted=Accepted(tokens[-1:].expand(len(tokens)), step.accepted.nodes))


@torch.inference_mode()
def run(inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The authors check the length behind a pass, and cut what went past it off."""
    model, prompt = llama(inputs), torch.from_numpy(inputs["in_ids"])[0]
    level, size = int(inputs["hp_level"]), int(inputs["hp_window"])
    method = Lookahead(level, size, int(inputs["hp_guess_set_size"]), prompt_pool=bool(inputs["hp_pool_from_prompt"]))
    session = Session(method, Budget(1.0), method.start(model.config.vocab_size))
    session.begin(prompt)
    session.state.levels = [torch.from_numpy(inputs["in_initial_window"])]
    tokens, reader, limit = prompt, Reader(model), len(prompt) + int(inputs["hp_max_new_tokens"])
    accepted: list[int] = []
    guesses: list[int] = []
    while len(tokens) < limit:
        step = session.step(reader, tokens)
        session.learn(released(step))
        tokens = torch.cat([tokens, step.accepted.tokens])
        accepted.append(len(step.accepted.tokens))
        guesses.append(len(step.tree.tokens) // (level - 2))
        if int(inputs["hp_eos_token_id"]) in step.accepted.tokens.tolist():
            break
    return {
        "out_ids": tokens[None, :limit].numpy(),
        "out_steps": np.array(len(accepted)),
        "out_tokens_per_step": np.array(accepted),
        "out_guesses_per_step": np.array(guesses),
    } | listed(session.state.pool)
