"""How fast and how large is balancing? python bench.py: data.balance on 25,000 and 50,000 rows with random unit vectors for embeddings."""
import resource
import time

import torch

import data

for n in (25_000, 50_000):
    rows = [{"prompt": str(i), "category": list(data.CATEGORIES)[min(i % 13, 6)]} for i in range(n)]
    vectors = torch.nn.functional.normalize(torch.randn(n, 384, generator=torch.Generator().manual_seed(0)), dim=1)
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.time()
    assert len(data.balance(rows, 72, vectors)) == 504
    seconds, peak = time.time() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(f"{n} rows: {seconds:.1f} s; peak memory of the process {peak / 2 ** 20:.2f} GB, {(peak - before) / 2 ** 20:.2f} GB of it from balancing")
