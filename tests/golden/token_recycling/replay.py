"""Token Recycling: the authors' tree buffers, drafts, table updates and whole greedy runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from prunelab.common.core.budget import Budget
from prunelab.common.speculative import Reader, Session
from prunelab.methods.token_recycling.method import Template, TokenRecycling, expand, renew


def replay(case: str, inputs: Mapping[str, np.ndarray], wanted: Sequence[str]) -> dict[str, np.ndarray]:
    if case.startswith("update"):
        return update(inputs)
    padded = inputs["in_tree_template"].tolist()
    paths = tuple(tuple(rank for rank in path if rank >= 0) for path in padded)
    if case.startswith("buffers"):
        return buffers(Template.of(paths))
    if case.startswith("expand"):
        return drafts(inputs, Template.of(paths))
    return runs(inputs, paths, wanted)


def buffers(template: Template) -> dict[str, np.ndarray]:
    """The authors count the root as node 0, so that ours are theirs less one."""
    tree = template.tree
    count = len(tree.tokens)
    mask = torch.eye(count + 1, dtype=torch.long)
    mask[:, 0] = 1
    mask[1:, 1:] = tree.ancestors
    leaves = [i for i in range(count) if i not in tree.parents.tolist()]
    routes = torch.full((len(leaves), int(tree.depths.max()) + 1), -1)
    for row, leaf in enumerate(leaves):
        nodes = torch.cat([torch.zeros(1), 1 + tree.ancestors[leaf].nonzero().squeeze(1)])
        routes[row, : len(nodes)] = nodes
    root, unranked = torch.tensor([0]), torch.tensor([-1])
    return {
        "out_tree_mask": mask.numpy(),
        "out_depth": torch.cat([root, tree.depths]).numpy(),
        "out_paths": routes.numpy(),
        "out_parent": torch.cat([unranked, tree.parents + 1]).numpy(),
        "out_child_rank": torch.cat([unranked, template.ranks]).numpy(),
        "out_level_starts": np.array([b + 1 for b in template.bounds]),
    }


def drafts(inputs: Mapping[str, np.ndarray], template: Template) -> dict[str, np.ndarray]:
    table, roots = torch.from_numpy(inputs["in_adj"]), torch.from_numpy(inputs["in_roots"])
    trees = [torch.cat([root, expand(table, root, template)]) for root in roots.split(1)]
    return {"out_tree_ids": torch.stack(trees).numpy()}


def update(inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    table, tokens = torch.from_numpy(inputs["in_adj"]).clone(), torch.from_numpy(inputs["in_tree_ids"])
    logits = torch.from_numpy(inputs["in_logits"])
    before = table.clone()
    renew(table, tokens, logits)
    last = {int(token): row for row, token in enumerate(tokens)}
    rows = before.index_copy(0, torch.tensor(list(last)), logits[list(last.values())].topk(table.shape[1]).indices)
    return {"out_adj": table.numpy(), "out_last_write_wins": np.array(torch.equal(table, rows))}


def llama(inputs: Mapping[str, np.ndarray]):
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {
        name: int(inputs[f"in_{name}"]) for name in ("vocab", "hidden", "layers", "heads", "kv_heads", "intermediate")
    }
    config = LlamaConfig(
        vocab_size=sizes["vocab"],
        hidden_size=sizes["hidden"],
        num_hidden_layers=sizes["layers"],
        num_attention_heads=sizes["heads"],
        num_key_value_heads=sizes["kv_heads"],
        intermediate_size=sizes["intermediate"],
        max_position_embeddings=512,
        eos_token_id=int(inputs["in_eos"]),
        bos_token_id=None,
        rms_norm_eps=1e-6,
    )
    model = LlamaForCausalLM(config).eval()
    weights = {name[2:]: torch.from_numpy(value) for name, value in inputs.items() if name.startswith("w_")}
    model.load_state_dict(weights)
    return model


@torch.inference_mode()
def runs(inputs: Mapping[str, np.ndarray], paths: tuple[tuple[int, ...], ...], wanted: Sequence[str]):
    """Every prompt of the case with one table. The authors stop by rules of their own: a run goes on for up to a whole
    tree beyond the limit, and an EOS behind the draft is counted but not returned."""
    model, eos, limit = llama(inputs), int(inputs["in_eos"]), int(inputs["in_max_new_tokens"])
    method = TokenRecycling(candidates=inputs["in_adj_init"].shape[1], tree=paths)
    session = Session(method, Budget(1.0), method.start(int(inputs["in_vocab"])))
    session.state.table.copy_(torch.from_numpy(inputs["in_adj_init"]))
    out: dict[str, np.ndarray] = {}
    gaps: list[Tensor] = []
    same = True
    for q in range(sum(name.endswith("_in_prompt") for name in inputs)):
        prompt = torch.from_numpy(inputs[f"q{q}_in_prompt"])
        tokens, reader, step_count = prompt, Reader(model), 0
        lengths, trees, choices, before = [], [], [], []
        while True:
            before.append(session.state.table.clone())
            step = session.step(reader, tokens)
            trees.append(torch.cat([step.root, step.tree.tokens]))
            choices.append(step.logits.argmax(-1))
            gaps.append(-step.logits.topk(9).values.diff(dim=-1).amax())
            lengths.append(len(step.accepted.tokens))
            tokens = torch.cat([tokens, step.accepted.tokens])
            drafted = torch.cat([step.root, step.accepted.tokens[:-1]])  # theirs: the root is appended with its draft
            count = len(tokens) - 1 - len(prompt)
            if bool((drafted == eos).any()) or count > limit:
                break
            session.learn(step)
            if int(tokens[-1]) == eos:
                count += 1
                break
            step_count += 1
        plain = model.generate(prompt[None], max_new_tokens=limit, do_sample=False)[0]
        same &= torch.equal(tokens[: len(plain)], plain)
        out |= {
            f"q{q}_out_ids": tokens[:-1].numpy(),
            f"q{q}_out_new_token_count": np.array(count),
            f"q{q}_out_step": np.array(step_count),
            f"q{q}_out_accept_lengths": np.array(lengths),
            f"q{q}_out_tree_ids": torch.stack(trees).numpy(),
            f"q{q}_out_tree_argmax": torch.stack(choices).numpy(),
            f"q{q}_out_adj_after": session.state.table.clone().numpy(),
            f"q{q}_out_adj_before_each_step": torch.stack(before).numpy(),
        }
    out |= {"out_matches_plain_greedy": np.array(same), "out_min_top9_logit_gap": torch.stack(gaps).min().numpy()}
    return {name: value for name, value in out.items() if name in wanted}
