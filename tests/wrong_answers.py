"""Wrong answers that tests/test_exercises.py gives to the graders, by exercise.

Each has its kind, and an edit of the answer (what stands there, what is put there), or several, or
a function written out. Kinds that graders once accepted have a name.
"""

KINDS = {
    "batch": "asked or computed over the whole batch, where each row has its own",
    "rank": "a shape of an argument that broadcasts to something wrong",
    "in place": "an argument is changed",
    "float32": "float64 comes in, float32 is computed with or comes out",
    "float64": "float32 comes in, float64 comes out",
    "unused": "an argument counts where it should not",
    "offset": "masked places or offsets: completions taken to begin at column 0",
    "types": "tensors where numbers are wanted, or other types",
    "second": "only the first of several counts",
    "far": "numbers far below zero, or far apart",
    "compile": "the interpreter runs it, the compiler does not",
}
LOAD = 'mask=col < V, other=float("-inf")) * inv_temperature\n        higher'
TWICE = (
    "target = tl.load(",
    """total = 0.0
    for start in range(0, V, BLOCK):
        col = start + tl.arange(0, BLOCK)
        x = tl.load(Z + n * stride + col, mask=col < V, other=float("-inf")) * inv_temperature
        total += tl.sum(tl.exp(x - top), 0)
    target = tl.load(""",
)
LINES = r"""
def parse_draft(text):
    head, *answers = text.split("\n#### ")
    if len(answers) != 1 or not answers[0].strip() or not all(s.strip() for s in head.split("\n")):
        raise ValueError("malformed")
    return head.split("\n"), answers[0]
"""
REREAD = """
def generate(model, prompts, samples=1, max_new_tokens=64, temperature=1.0, eos=()):
    out = []
    for prompt in [p for p in prompts for _ in range(samples)]:
        out.append([])
        while len(out[-1]) < max_new_tokens and not (out[-1] and out[-1][-1] in eos):
            ids = torch.tensor([prompt + out[-1]])
            out[-1].append(model(ids)[0, -1].argmax().item())
    return out
"""
ROTATE_IN_PLACE = """
def rotate(x, rope):
    cos, sin = (z[..., : z.shape[-1] // 2] for z in rope)
    a, b = x.chunk(2, dim=-1)
    first = a * cos - b * sin
    b.copy_(b * cos + a * sin)
    a.copy_(first)
    return x
"""
STEP = """
def sft_step(policy, batch, optimizer):
    loss = sft_loss(token_logps(policy, batch), batch.mask)
    {}
    return loss.item()
"""
CLIP = "torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)"
Z = "z = h @ W.T / temperature\n    top = {}\n    "
Z += "logps = z - top - (z - top).exp().sum(-1, keepdim=True).log()"
LOGITS = "logps = (h @ W.T / temperature).log_softmax(-1)"
LOGSUMEXP = "torch.logsumexp(r_samples / beta + log_ratio, dim=1)"
BY_HAND = "(lambda x, m: (x - m).exp().sum(1).log() + m[:, 0])(r_samples / beta + log_ratio, {})"
R_SHAPES = "r_demo.ndim != 1 or r_samples.ndim != 2 or len(r_demo) != len(r_samples)"
SHAPES = "((), (len(rewards), 1), rewards.shape)"
EQUAL = "(rewards == rewards[:, :1]).all(dim=1, keepdim=True)"
FIRST_ENDS = """ends = torch.zeros_like(learnt[:P, :G])
        ends.scatter_(1, R.argmax(1, keepdim=True), True)
        ends.scatter_(1, R.argmin(1, keepdim=True), True)"""
ENDS = "ends = (R == R.amax(1, keepdim=True)) | (R == R.amin(1, keepdim=True))"
WEIGHT = "1 / ((sequences or len(mask)) * lengths.to(logp.dtype))"
LEFT = "mask = torch.arange(mask.shape[1]) < mask.sum(1, keepdim=True)\n    lengths = mask.sum(1)"
A_SHAPE = 'if advantage.shape != logp.shape[:1]:\n        raise ValueError("want advantage (B,)")'
FOUR = "if not logp.shape == logp_old.shape == logp_ref.shape == mask.shape:"
FRESH = "logps(p).detach()[rows], logp_ref[p][rows]"
LAST = """optimizer.step()
            optimizer.zero_grad()
        losses.append(total)
    return losses"""
ANYWHERE = """
def refuses(answer):
    text = answer.lower().replace("’", "'")
    return any(phrase in text for phrase in ({}))
"""
OPENINGS = """
def refuses(answer):
    text = answer.lower().replace("’", "'")
    return text.startswith(("i can't", "i cannot", "i won't", "i'm sorry", "sorry", "i'm afraid"))
"""
AREA = "pairs = [(p > n) + 0.5 * (p == n) for p in positive for n in negative]"
STD = "std = tl.sqrt(tl.sum(centred * centred, 0) / samples)"
MEAN_SQUARE = "tl.sum(r * r, 0) / samples - tl.sum(r, 0) / samples * tl.sum(r, 0) / samples"
DIFFER = "tl.sum(tl.where(mine & (r != first), 1, 0), 0)"
MEAN = "tl.sum(r, 0) / samples, 0.0)"
A_LOOP = """total = {}
    for k in range(0, samples):
        total += tl.load(R + prompt * r_prompt + k * r_sample)
    centred = tl.where(mine, r - total / samples, 0.0)"""

WRONG = {
    "ex01_balance": [
        ("", "k_center(embeddings[at], per_category, seed)", "range(per_category)"),
        ("", "sorted(chosen)", "chosen"),
        ("", "embeddings[at], per_category, seed", "embeddings[at], per_category"),
        ("", "per_category - len(at) for", "len(at) for"),
        ("", "if len(at) < per_category", "if len(at) + 1 < per_category"),
        ("second", '", ".join(f"{c} ({n} missing)" for c, n in short.items())',
         'next(f"{c} ({n} missing)" for c, n in short.items())'),
        ("in place", "    return out", '    for r in out:\n        r["kept"] = 1\n    return out'),
        ("in place", "        raise", "        rows.clear()\n        raise"),
        ("in place", "    return out",
         "    rows.sort(key=lambda r: r['category'])\n    return out"),
        ("types", "return out", "return tuple(out)"),
    ],
    "ex02_parse_draft": [
        ("", "answer[1:]", "answer.strip()"),
        ("", 'text.split("####")', 'text.rsplit("####", 1)'),
        ("", 'head.removesuffix("\\n")', "head.strip()"),
        ("", 'not head.endswith("\\n") or ', ""),
        ("", LINES),
        ("", '.split("\\n")\n', ".splitlines()\n"),
        ("types", "return steps, answer[1:]", "return tuple(steps), answer[1:]"),
        ("types", "return steps, answer[1:]", "return [steps, answer[1:]]"),
    ],
    "ex03_rope": [
        ("", "/ c.head_dim)", "/ (c.head_dim // 2))"),
        ("", "((turns - low) / (high - low))", "((high - turns) / (high - low))"),
        ("", ".clamp(0, 1)", ""),
        ("", "(-b, a)", "(b, -a)"),
        ("", "x.chunk(2, dim=-1)", "(x[..., ::2], x[..., 1::2])"),
        ("", "cos, sin = rope", "cos, sin = (z.to(x.dtype) for z in rope)"),
        ("types", "freq.float()", "freq"),
        ("in place", ROTATE_IN_PLACE),
        ("float32", "(x * cos", "(x.float() * cos.float()"),
        ("float32", "cos, sin = rope", "cos, sin = (z.float() for z in rope)"),
    ],
    "ex04_sampling": [
        ("", "right=True", "right=False"),
        ("", "(logits / temperature)", "(logits * temperature)"),
        ("", "before >= p", "before + probs > p"),
        ("", ".scatter(1, order, beyond)", " | beyond"),
        ("", " & (p < 1)", ""),
        ("", "descending=True", "descending=False"),
        ("far", "(logits / temperature).softmax(-1)", "(logits / temperature).exp()"),
        ("far", "(logits / temperature).softmax(-1)",
         "(logits / temperature).sub((logits / temperature).amax()).exp()"),
        ("far", "probs, order = logits.softmax(-1).sort",
         "probs, order = (logits.exp() / logits.exp().sum(-1, keepdim=True)).sort"),
        ("batch", "before >= p", "before.mean(0, keepdim=True).expand_as(before) >= p"),
        ("batch", "draws[:, None]", "draws[:1, None].expand(len(draws), 1)"),
        ("in place", "logits.masked_fill", "logits.masked_fill_"),
        ("in place", "(logits / temperature)", "logits.div_(temperature)"),
        ("float32", "return logits.masked_fill", "return logits.float().double().masked_fill"),
        ("float32", "(logits / temperature).softmax(-1)",
         "(logits / temperature).float().softmax(-1)"),
        ("unused", "if temperature == 0:\n        return logits.argmax(-1)",
         "temperature = temperature or 1e-6"),
        ("types", "right=True)[:, 0]", "right=True)"),
        ("types", "right=True)[:, 0]", "right=True)[:, 0].int()"),
        ("second", "    return logits.masked", "    cut[1:] = cut[:1]\n    return logits.masked"),
    ],
    "ex05_generate": [
        ("", "torch.arange(start, start + len(ids))", "torch.arange(len(ids))"),
        ("", "all_keys if start else None", "None"),
        ("", REREAD),
        ("", "out.append(row)", "out.append([token for token in row if token not in eos])"),
        ("second", "row[-1] in eos", "row[-1] in eos[:1]"),
        ("second", "row[-1] in eos", "row[-1] in eos[1:]"),
        ("second", "row[-1] in eos", "row[-1] == max(eos, default=-1)"),
        ("types", ".argmax().item()", ".argmax()"),
        ("types", "return out", "return [tuple(row) for row in out]"),
        ("types", "return out", "return tuple(out)"),
        ("in place", "out.append(row)", "prompt += row\n        out.append(row)"),
        ("batch", "return out", "return [row[: min(map(len, out))] for row in out]"),
    ],
    "ex06_completion_mask": [
        ("", "at >= prompt", "at > prompt"),
        ("", "at < lengths", "at <= lengths"),
        ("offset", "at < lengths[:, None]", "at < (prompt_lengths + lengths)[:, None]"),
        ("offset", "(at >= prompt_lengths[:, None]) & (at < lengths",
         "(at < (lengths - prompt_lengths)"),
        ("batch", "at >= prompt_lengths[:, None]", "at >= prompt_lengths.min()"),
        ("in place", "at < lengths[:, None]",
         "at < lengths.sub_(prompt_lengths).add(prompt_lengths)[:, None]"),
        ("types", "& (at < lengths[:, None])", "& (at < lengths[:, None]).long()"),
    ],
    "ex07_token_logprobs": [
        ("", " / temperature)", ")"),
        ("", "/ temperature).log_softmax(-1)", ").log_softmax(-1) / temperature"),
        ("", "log_softmax(-1)", "softmax(-1).log()"),
        ("", "log_softmax(-1)", "log_softmax(0)"),
        ("far", LOGITS, Z.format("0.0")),
        ("far", LOGITS, Z.format("z.amax(-1, keepdim=True).clamp(min=-1e4)")),
        ("far", LOGITS, Z.format("z.amax(-1, keepdim=True).clamp(min=-1e5)")),
        ("batch", LOGITS, Z.format("z.amax()")),
        ("float32", "log_softmax(-1)", "float().log_softmax(-1).to(h.dtype)"),
        ("float32", "log_softmax(-1)", "float().log_softmax(-1)"),
        ("in place", LOGITS, "with torch.no_grad():\n        h.div_(temperature)\n"
         "    logps = (h @ W.T).log_softmax(-1)"),
        ("types", "[:, 0]", ""),
    ],
    "ex08_sft": [
        ("batch", "(logps.sum(1) / mask.sum(1)).mean()", "(logps.sum() / mask.sum())"),
        ("offset", "logps.sum(1) / mask.sum(1)", "logps.mean(1)"),
        ("offset", "mask.sum(1)", "(logps != 0).sum(1)"),
        ("offset", "logps.sum(1)", "(logps * (torch.arange(mask.shape[1]) "
         "< mask.sum(1, keepdim=True))).sum(1)"),
        ("second", ".mean()", "[0]"),
        ("float64", "logps.sum(1)", "logps.double().sum(1)"),
        ("float32", "logps.sum(1)", "logps.float().sum(1).double()"),
        ("float32", "logps.sum(1)", "logps.float().sum(1)"),
        ("in place", "logps.sum(1) / mask.sum(1)", "logps.div_(mask.sum(1, keepdim=True)).sum(1)"),
        ("types", "return loss.item()", "return loss"),
        ("types", "return loss.item()", "return loss.detach()"),
        ("", STEP.format(f"loss.backward()\n    {CLIP}\n    optimizer.step()")),
        ("", STEP.format(f"{CLIP}\n    loss.backward()\n    optimizer.step()\n"
                         "    optimizer.zero_grad()")),
        ("", CLIP, ""),
        ("", CLIP, CLIP.replace("norm_", "value_")),
        ("", CLIP, f"[{CLIP.replace('policy.parameters()', '[p]')} for p in policy.parameters()]"),
        ("", "return loss.item()",
         "return sft_loss(token_logps(policy, batch), batch.mask).item()"),
        ("", "return -(", "return ("),
    ],
    "ex09_irl_loss": [
        ("", LOGSUMEXP, "torch.logsumexp(r_samples / beta, dim=1)"),
        ("", LOGSUMEXP, "(r_samples / beta + log_ratio).exp().sum(1).log()"),
        ("", "(r_demo[:, None] - r_samples)", "(r_samples - r_demo[:, None])"),
        ("", "(r_samples.mean(1) - r_demo).mean() / beta", "(r_samples.mean(1) - r_demo).mean()"),
        ("", "dim=1) - r_demo / beta)", "dim=1) - r_demo)"),
        ("unused", "(r_demo[:, None] - r_samples)", "(r_demo[:, None] - r_samples - log_ratio)"),
        ("unused", "(r_samples.mean(1) - r_demo)", "((r_samples + log_ratio).mean(1) - r_demo)"),
        ("unused", "/ beta).mean()\n    raise", "/ beta - log_ratio).mean()\n    raise"),
        ("rank", R_SHAPES, "False"),
        ("rank", R_SHAPES, "len(r_demo) != len(r_samples)"),
        ("rank", R_SHAPES, "r_samples.ndim != 2 or r_demo.numel() != len(r_samples)"),
        ("rank", R_SHAPES, "r_demo.ndim > 1 or r_samples.ndim != 2"),
        ("rank", R_SHAPES, "r_demo.ndim != 1 or len(r_demo) != len(r_samples)"),
        ("batch", LOGSUMEXP, "torch.logsumexp(r_samples / beta + log_ratio, dim=(0, 1))"),
        ("second", "r_samples.mean(1)", "r_samples[:, 0]"),
        ("far", LOGSUMEXP, BY_HAND.format("r_samples.new_zeros(len(r_samples), 1)")),
        ("far", LOGSUMEXP, BY_HAND.format("(r_samples / beta).amax(1, True).clamp(min=-1e4)")),
        ("far", LOGSUMEXP, BY_HAND.format("(r_samples / beta).amax(1, True).clamp(min=-1e5)")),
        ("float64", LOGSUMEXP, "torch.logsumexp((r_samples / beta + log_ratio).double(), dim=1)"),
        ("batch", LOGSUMEXP, BY_HAND.format("(r_samples / beta).amax().expand(len(r_samples), 1)")),
        ("float32", LOGSUMEXP, "torch.logsumexp((r_samples / beta + log_ratio).float(), dim=1)"),
        ("float32", "F.logsigmoid((r_demo[:, None] - r_samples) / beta).mean()",
         "F.logsigmoid((r_demo[:, None] - r_samples).float() / beta).mean().double()"),
        ("in place", "(r_samples.mean(1) - r_demo)", "r_samples.sub_(r_demo[:, None]).mean(1)"),
    ],
    "ex10_similarity": [
        ("", "cos.max(dim=1)", "cos.max(dim=0)"),
        ("", ".max(dim=1).values", ""),
        ("", "F.normalize(response, dim=1)", "response"),
        ("", "torch.sigmoid(1 - W)", "torch.sigmoid(W)"),
        ("", "/ torch.sigmoid(mean_delta)", "/ mean_delta"),
        ("in place", "F.normalize(response, dim=1)",
         "response.div_(response.norm(dim=1, keepdim=True))"),
        ("in place", "F.normalize(demonstration, dim=1)",
         "demonstration.div_(demonstration.norm(dim=1, keepdim=True))"),
        ("in place", "torch.sigmoid(1 - W)", "W.neg_().add_(1).sigmoid_()"),
        ("float32", "response.new_zeros(())", "torch.zeros(())"),
        ("float64", "values.mean()", "values.double().mean()"),
        ("float32", "cos.max(dim=1)", "cos.float().max(dim=1)"),
        ("float32", "values.mean()", "values.float().mean().to(cos.dtype)"),
        ("float32", "torch.as_tensor(mean_delta, dtype=W.dtype)",
         "torch.as_tensor(mean_delta).float().to(W.dtype)"),
        ("types", "response.new_zeros(())", "0.0"),
        ("types", "torch.as_tensor(mean_delta, dtype=W.dtype)", "torch.as_tensor(mean_delta)"),
        ("second", "values.mean()", "values[0]"),
    ],
    "ex11_model_responsiveness": [
        ("", "int(drop *", "round(drop *"),
        ("", ".abs()", ""),
        ("", "(gaps - gaps.mean())", "gaps"),
        ("", "inlying.mean()", "gaps.mean()"),
        ("", "stable=True)", "stable=True).flip(0)"),
        ("", "argsort(stable=True)", "argsort()"),
        ("types", "torch.as_tensor(mean_gap, dtype=gaps.dtype)", "torch.as_tensor(mean_gap)"),
        ("types", "torch.sigmoid(inlying.mean()) / torch.sigmoid(mean_gap)",
         "(torch.sigmoid(inlying.mean()) / torch.sigmoid(mean_gap)).item()"),
        ("float32", "inlying.mean()", "inlying.float().mean().to(gaps.dtype)"),
        ("float32", "inlying.mean()", "inlying.float().mean()"),
        ("in place", "(gaps - gaps.mean())", "gaps.sub_(gaps.mean())"),
        ("in place", "    return", "    gaps.sub_(mean_gap)\n    return"),
    ],
    "ex12_difficulty_scale": [
        ("", "(a + b) / 2", "a + b"),
        ("", '"data": a,', '"data": b,'),
        ("", '"product")', '"sum")'),
        ("", "alpha_data.detach()", "alpha_data"),
        ("unused", '"data": a,', '"data": a + 0 * b,'),
        ("unused", '"model": b,', '"model": a * b / a,'),
        ("unused", '"none": torch.ones_like(a)', '"none": a / a'),
        ("float32", '"product": a * b', '"product": (a.float() * b.float()).to(a.dtype)'),
        ("float64", "alpha_data.detach()", "alpha_data.detach().double()"),
        ("float32", "(a * b) ** 8", "(a * b).float() ** 8"),
        ("in place", "alpha_data.detach()", "alpha_data.requires_grad_(False)"),
        ("in place", "alpha_model.detach()", "alpha_model.detach().clamp_(min=1)"),
    ],
    "ex13_group_advantage": [
        ("", "centred.pow(2).mean(dim=1, keepdim=True).sqrt()", "rewards.std(1, keepdim=True)"),
        ("", ".masked_fill(equal, 0.0)", ""),
        ("", "(rewards == rewards[:, :1])", "rewards.isclose(rewards[:, :1])"),
        ("", EQUAL, "rewards.std(1, correction=0, keepdim=True) < 1e-6"),
        ("", "keepdim=True).sqrt()", "keepdim=True).add(eps).sqrt() - eps"),
        ("batch", EQUAL, "(rewards == rewards[:, :1]).all()"),
        ("batch", EQUAL, "(rewards == rewards[:, :1]).all(dim=1).any()"),
        ("batch", EQUAL, "(rewards == rewards[0, 0]).all(dim=1, keepdim=True)"),
        ("batch", "rewards.mean(dim=1, keepdim=True)", "rewards.mean()"),
        ("batch", "centred.pow(2).mean(dim=1, keepdim=True)", "centred.pow(2).mean()"),
        ("rank", SHAPES, "((), (len(rewards), 1), rewards.shape, (rewards.shape[1],))"),
        ("rank", SHAPES, "((), (1,), (len(rewards), 1), rewards.shape)"),
        ("rank", SHAPES, "((), (1, 1), (len(rewards), 1), rewards.shape)"),
        ("rank", SHAPES, "((), (1, *rewards.shape), (len(rewards), 1), rewards.shape)"),
        ("rank", f"if alpha.shape not in {SHAPES}", "if alpha.numel() > rewards.numel()"),
        ("in place", "rewards - rewards.mean(dim=1, keepdim=True)",
         "rewards.sub_(rewards.mean(dim=1, keepdim=True))"),
        ("in place", "return alpha *", "rewards += 0.5\n    return alpha *"),
        ("in place", "return alpha * (centred / (std + eps)).masked_fill(equal, 0.0)",
         "out = alpha * (centred / (std + eps)).masked_fill(equal, 0.0)\n"
         "    alpha.zero_()\n    return out"),
        ("float32", "centred = rewards -", "centred = rewards.float() -"),
        ("float64", "return alpha *", "return alpha.double() *"),
        ("float32", "keepdim=True).sqrt()", "keepdim=True).float().sqrt().to(rewards.dtype)"),
    ],
    "ex14_learnt": [
        ("", "learnt[P:, G] = True", "learnt[:, G] = True"),
        ("", "ends & (A[:P, :G] != 0)", "ends"),
        ("", "A[:P, :G] = samples", "A[:P, :G] = samples.abs()"),
        ("", "R.new_ones(", "R.new_zeros("),
        ("unused", "learnt[:P, :G] = True", "learnt[:P, :G] = A[:P, :G] != 0"),
        ("unused", "group_advantage(R, alpha, g.std_eps)", "group_advantage(R, alpha)"),
        ("batch", "R.amax(1, keepdim=True)", "R.amax()"),
        ("batch", "R.amin(1, keepdim=True)", "R.amin()"),
        ("batch", "ends & (A[:P, :G] != 0)", "ends & bool((A[:P, :G] != 0).all())"),
        ("second", ENDS, FIRST_ENDS),
        ("offset", "learnt[P:, G] = True", "learnt[:anchors, G] = True"),
        ("offset", "learnt[P:, G] = True", "learnt[P:, 0] = True"),
        ("types", "return A, learnt", "return A, learnt.float()"),
        ("types", "return A, learnt", "return A, learnt.long()"),
        ("float32", "R.new_ones(P + anchors, G + 1)", "torch.ones(P + anchors, G + 1)"),
        ("float32", "A[:P, :G] = samples", "A[:P, :G] = samples.float()"),
        ("in place", "group_advantage(R,", "group_advantage(R.sub_(R.mean(1, keepdim=True)),"),
    ],
    "ex15_kl_k3": [
        ("", "logp_ref - logp)", "logp - logp_ref)"),
        ("", "torch.exp(d) - d - 1", "torch.exp(d) - 1"),
        ("", ".clamp(-20, 20)", ""),
        ("", "torch.exp(d) - d - 1", "d**2 / 2"),
        ("", "torch.exp(d) - d - 1", "-d"),
        ("", "(logp_ref - logp).clamp(-20, 20)",
         "(lambda d: d + (d.clamp(-20, 20) - d).detach())(logp_ref - logp)"),
        ("float32", "torch.exp(d) - d - 1", "(torch.exp(d.float()) - d.float() - 1).to(d.dtype)"),
        ("float32", "torch.exp(d) - d - 1", "torch.exp(d.float()) - d.float() - 1"),
        ("float64", "(logp_ref - logp)", "(logp_ref - logp).double()"),
        ("in place", "(logp_ref - logp)", "logp_ref.sub_(logp)"),
        ("types", "torch.exp(d) - d - 1", "(torch.exp(d) - d - 1).mean()"),
    ],
    "ex16_loss": [
        ("", "return -(weight", "return (weight"),
        ("", "torch.minimum(rho * A, rho.clamp(1 - clip, 1 + clip_high) * A)",
         "rho.clamp(1 - clip, 1 + clip_high) * A"),
        ("", "rho.clamp(1 - clip, 1 + clip_high)", "rho.clamp(1 - clip, 1 + clip)"),
        ("", "rho.clamp(1 - clip, 1 + clip_high)",  # ties halve the gradient
         "torch.maximum(rho, 1 - clip + 0 * A).minimum(1 + clip_high + 0 * A)"),
        ("", "if clip_high == 0:", "if False:"),
        ("", "torch.where(A > 0, logp.detach(), logp_old)", "logp.detach()"),
        ("", "torch.where(A > 0, logp.detach(), logp_old)", "torch.where(A > 0, logp, logp_old)"),
        ("", "(sequences or len(mask))", "len(mask)"),
        ("", "- beta_kl * (", "+ beta_kl * ("),
        ("", "(A < 0) & (rho < 1 - clip)", "rho < 1 - clip"),
        ("", "(A > 0) & (rho > 1 + clip_high)", "rho > 1 + clip_high"),
        ("unused", "torch.where(A > 0, logp.detach(), logp_old)",
         "logp.detach() * (A > 0) + logp_old * (A <= 0)"),
        ("unused", "torch.where(A > 0, logp.detach(), logp_old)",
         "torch.where(A > 0, logp.detach() + 0 * logp_old, logp_old)"),
        ("batch", WEIGHT, "torch.full((len(mask),), 1 / mask.sum(), dtype=logp.dtype)"),
        ("batch", WEIGHT, "1 / (lengths.to(logp.dtype).mean() * len(mask)) + 0 * lengths"),
        ("offset", "lengths = mask.sum(1)", LEFT),
        ("offset", "lengths = mask.sum(1)",
         "mask = mask.flip(1).cumsum(1).flip(1) > 0\n    lengths = mask.sum(1)"),
        ("offset", "logp[mask], logp_old[mask]", "logp[mask], (logp_old * mask)[mask.roll(1, 0)]"),
        ("types", "(weight * x).sum().item()", "(weight * x).sum()"),
        ("types", "(weight * x).sum().item()", "(weight * x).sum().detach()"),
        ("types", "return -(weight * (surrogate",
         "info = tuple(info.values())\n    return -(weight * (surrogate"),
        ("float32", "lengths.to(logp.dtype)", "lengths.float()"),
        ("float64", "lengths.to(logp.dtype)", "lengths.double()"),
        ("float32", "torch.exp(logp - logp_old)", "torch.exp((logp - logp_old).float())"),
        ("float32", "(weight * x).sum().item()", "x.float().mean().item()"),
        ("rank", A_SHAPE, "advantage = advantage.flatten().expand(len(logp))"),
        ("rank", A_SHAPE, "advantage = advantage.flatten()[: len(logp)]"),
        ("rank", A_SHAPE, "if advantage.numel() != len(logp):\n        raise ValueError\n"
         "    advantage = advantage.flatten()"),
        ("rank", FOUR, FOUR.replace(" == mask.shape", "")),
        ("rank", FOUR, "logp_old, logp_ref = (x.expand_as(logp) for x in (logp_old, logp_ref))\n"
         "    if False:"),
        ("in place", "lengths = mask.sum(1)",
         "logp_ref.masked_fill_(~mask, 0.0)\n    lengths = mask.sum(1)"),
        ("in place", "info = {", "advantage.abs_()\n    info = {"),
        ("second", "lengths = mask.sum(1)",
         "mask = mask & (mask.cumsum(1) == 1)\n    lengths = mask.sum(1)"),
    ],
    "ex17_updates": [
        ("", "logp_old[p][rows], logp_ref[p][rows]", FRESH),
        ("", "logp_old[p][rows], logp_ref", "logp_ref[p][rows], logp_ref"),
        ("", "g.beta_kl, sequences)", "g.beta_kl)"),
        ("", "rows = learnt[p]", "rows = slice(None)"),
        ("", "g.clip, g.clip_high", "g.clip_high, g.clip"),
        ("", "            optimizer.zero_grad()\n", ""),
        ("", LAST, "pass\n        losses.append(total)\n    optimizer.step()\n    return losses"),
        ("", "part.backward()\n", "part.backward()\n            optimizer.step()\n"),
        ("", "if sequences:\n            optimizer.step()\n            optimizer.zero_grad()",
         "optimizer.step()\n        optimizer.zero_grad(set_to_none=False)"),
        ("batch", "learnt[prompts].sum()", "learnt.sum()"),
        ("batch", "learnt[prompts].sum()", "learnt[prompts].numel()"),
        ("batch", "advantages(R, alpha,", "advantages(R, alpha.mean().expand_as(alpha),"),
        ("second", "for prompts in order:", "for prompts in order[:1]:"),
        ("second", "(p for p in prompts if", "(p for p in prompts[:1] if"),
        ("offset", "mask[p][rows]\n",
         "(torch.arange(mask.shape[2]) < mask[p][rows].sum(1)[:, None])\n"),
        ("offset", "mask[p][rows]\n", "torch.ones_like(mask[p][rows])\n"),
        ("types", "part.item()", "part.detach()"),
        ("types", "return losses", "return torch.tensor(losses)"),
        ("float32", "A[p][rows]", "A[p][rows].float().double()"),
        ("float32", "logps(p) for p in", "logps(p).float().double() for p in"),
        ("in place", "    losses = []", "    R -= R.mean(1, keepdim=True)\n    losses = []"),
        ("in place", "losses.append(total)", "losses.append(total)\n        prompts.clear()"),
    ],
    "ex18_refusal_rule": [
        ("", ANYWHERE.format('"can\'t", "cannot", "won\'t", "not able", "unable", "refuse"')),
        ("", ANYWHERE.format('"i can\'t", "i cannot", "i won\'t", "i must decline", "i refuse"')),
        ("", OPENINGS),
        ("", ANYWHERE.format('"",')),
        ("", ANYWHERE.format("")),
        ("", ' (?:{helping})', ""),
        ("", 'answer.lower().replace("’", "\'")', "answer.lower()"),
        ("", "answer.lower()", "answer"),
        ("types", "bool(re.search(", "(re.search("),
        ("types", "bool(re.search(", "int(None is not re.search("),
        ("second", "answer.lower()", "answer.lower()[:25]"),
    ],
    "ex19_wilson_auc": [
        ("", "(p + z * z / (2 * n)) / a", "p"),
        ("", "z * z / (4 * n * n)", "0"),
        ("", "half = z *", "half ="),
        ("", "return 0.0, 1.0", "return 0.0, 0.0"),
        ("", "return max(0.0, middle - half), min(1.0, middle + half)",
         "half = z * math.sqrt(p * (1 - p) / n)\n"
         "    return max(0.0, p - half), min(1.0, p + half)"),
        ("", "(p > n) + 0.5 * (p == n)", "1.0 * (p > n)"),
        ("", "(p > n) + 0.5 * (p == n)", "1.0 * (p >= n)"),
        ("", "(p > n)", "(p < n)"),
        ("", "else math.nan", "else 0.5"),
        ("second", "for p in positive for n in negative", "for p, n in zip(positive, negative)"),
        ("second", "for n in negative", "for n in negative[:1]"),
        ("unused", "if n == 0", "z = 1.96\n    if n == 0"),
        ("types", "return 0.0, 1.0", "return 0, 1"),
        ("types", "return sum(pairs) / len(pairs)", "return torch.tensor(sum(pairs) / len(pairs))"),
        ("types", "return max(0.0, middle - half), min(1.0, middle + half)",
         "return [max(0.0, middle - half), min(1.0, middle + half)]"),
        ("in place", AREA, "positive.sort()\n    " + AREA),
        ("in place", AREA, "negative.sort()\n    " + AREA),
        ("float32", "return sum(pairs) / len(pairs) if pairs else math.nan",
         "return torch.tensor(pairs).float().mean().item() if pairs else math.nan"),
    ],
    "ex20_triton_advantage": [
        ("", "centred * centred, 0) / samples)", "centred * centred, 0) / (samples - 1))"),
        ("", "tl.where(mine, r - tl.sum(r, 0) / samples, 0.0)", "r - tl.sum(r, 0) / samples"),
        ("", "R + prompt * r_prompt + i * r_sample", "R + prompt * samples + i"),
        ("", "tl.where(differ == 0, 0.0, alpha", "tl.where(differ < 0, 0.0, alpha"),
        ("", ", a, mask=mine)", ", a)"),
        ("", "differ == 0", "std < 1e-6"),
        ("", "differ == 0", "std == 0"),
        ("far", "tl.sum(centred * centred, 0) / samples", MEAN_SQUARE),
        ("", "i * r_sample, mask=mine, other=0.0)", "i * r_sample, mask=mine)"),
        ("", DIFFER, 'tl.max(r, 0) - tl.min(tl.where(mine, r, float("inf")), 0)'),
        ("in place", "    a = ", "    tl.store(R + prompt * r_prompt + i * r_sample, centred, "
         "mask=mine)\n    a = "),
        ("in place", "    a = ", "    tl.store(ALPHA + prompt * a_prompt, 1.0)\n    a = "),
        ("compile", "centred = tl.where(mine, r - " + MEAN, A_LOOP.format("0")),
        ("compile", "differ == 0", "[differ] == [0]"),
        ("compile", STD, "std = tl.sqrt(sum([tl.sum(centred * centred, 0)]) / samples)"),
    ],
    "ex21_triton_logsumexp": [
        ("", "top, total = -3.4e38", 'top, total = float("-inf")'),
        ("", "total * tl.exp(top - higher)", "total"),
        ("", LOAD, LOAD.replace('float("-inf")', "0.0")),
        ("", LOAD, LOAD.replace(" * inv_temperature", "")),
        ("", "tl.load(T + n)) * inv_temperature", "tl.load(T + n))"),
        ("", *TWICE),
        ("far", "top, total = -3.4e38", "top, total = -1e4"),
        ("far", "top, total = -3.4e38", "top, total = 0.0"),
        ("far", "top, total = -3.4e38", "top, total = -2e4"),
        ("far", "top, total = -3.4e38", "top, total = -1e5"),
        ("far", LOAD, LOAD.replace('float("-inf")', "-1e4")),
        ("far", LOAD, LOAD.replace('float("-inf")', "-1e5")),
        ("far", "tl.maximum(top, tl.max(x, 0))", "tl.maximum(tl.max(x, 0), -1e4)"),
        ("in place", "top = higher", "tl.store(Z + n * stride + col, x - higher, mask=col < V)\n"
         "        top = higher"),
        ("compile", "top, total = -3.4e38, 0.0", "top, total = -3.4e38, 0"),
        ("compile", "top, total = -3.4e38, 0.0", "top, total = -3.4e38, False"),
        ("compile", "tl.maximum(top, tl.max(x, 0))", "max([top, tl.max(x, 0)])"),
    ],
    "ex22_triton_backward": [
        ("", "dz = g * inv_temperature *", "dz = g *"),
        ("", "tl.where(g == 0, 0.0, dz)", "dz"),
        ("", "dz), mask=col < V)", "dz))"),
        ("", "tl.where(col == target, 1.0, 0.0) - ", "0.0 - "),
        ("", "tl.exp(x - lse))", "tl.exp(x - top))"),
        ("", "dz = g *", "dz = -g *"),
        ("far", "top, total = -3.4e38", "top, total = -1e4"),
        ("far", "top, total = -3.4e38", "top, total = -2e4"),
        ("far", "top, total = -3.4e38", "top, total = -1e5"),
        ("in place", "    lse = top", "    tl.store(T + n, 0)\n    lse = top"),
        ("in place", "    lse = top", "    tl.store(G + n, g * inv_temperature)\n    lse = top"),
        ("compile", "top, total = -3.4e38, 0.0", "top, total = -3.4e38, 0"),
        ("compile", "tl.sum(tl.exp(x - higher), 0)", "sum([tl.sum(tl.exp(x - higher), 0)])"),
    ],
}  # fmt: skip
