"""Test sets are scored as BEIR scores them with pytrec_eval, to the last digits."""

import json
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
from forks import Ranks

from embedtune.data.beir import read_beir
from embedtune.data.testset_batches import TextBatch, TextDataset
from embedtune.evaluation.measure import measure
from embedtune.evaluation.metrics import RETRIEVAL_METRICS
from embedtune.evaluation.search import search
from embedtune.evaluation.sharded import Evaluation

pytrec_eval = pytest.importorskip("pytrec_eval")

SETS = 500
SHARED = 20
"""Sets that two ranks measure."""
CPU = torch.device("cpu")


class Case:
    """A random test set: texts are ids, and every oddity of real sets is there."""

    def __init__(self, seed: int) -> None:
        rng = np.random.default_rng(seed)
        names = [f"{prefix}{i}" for i in range(50) for prefix in ("d", "D", "é", "")]
        count = int(rng.choice([3, 12, 40, 130]))
        chosen = rng.permutation(names)[: count + 20].tolist()
        self.documents, missing = chosen[:count], chosen[count:]
        # Some queries are documents too, by intent or by accident.
        asked = [*rng.permutation(self.documents)[:4].tolist(), "q1", "q2", "q3", "q4", "q5"]
        self.queries = rng.permutation(asked).tolist()
        grades = [[-2, -1, 0, 1], [0], [1], [0, 1, 2, 3]]
        self.qrels: dict[str, dict[str, int]] = {}
        for query in (*self.queries[:-1], "no query"):  # one is not judged, one is not there
            judged = rng.permutation(self.documents)[: rng.choice([1, 2, 8, count])].tolist()
            judged += missing[: rng.integers(0, 3)] + [query] * bool(rng.integers(0, 2))
            drawn = rng.choice(grades[rng.integers(0, 4)], size=len(judged))
            self.qrels[query] = dict(zip(judged, drawn.tolist(), strict=True))
            if max(self.qrels[query].values()) < 0:  # pytrec_eval dies of it
                self.qrels[query][judged[0]] = 0
        self.qrels[self.queries[0]][self.documents[0]] = 2  # one at least is relevant
        self.texts = {}
        is_tied = seed % 2 == 0
        for name in dict.fromkeys([*self.documents, *self.queries]):
            values = rng.standard_normal(16)
            # The vertices of a cube have exact cosines, most of which are shared.
            self.texts[name] = (np.sign(values) if is_tied else values).astype(np.float32)

    def write(self, folder: Path) -> Path:
        (folder / "qrels").mkdir(parents=True)
        for file, names in (("corpus", self.documents), ("queries", self.queries)):
            rows = [json.dumps({"_id": name, "text": f"<{name}>"}) for name in names]
            (folder / f"{file}.jsonl").write_text("\n".join(rows))
        rows = [f"{q}\t{d}\t{grade}.0" for q, row in self.qrels.items() for d, grade in row.items()]
        (folder / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\n" + "\n".join(rows))
        return folder

    def embed(self, texts: list[str]) -> torch.Tensor:
        return torch.from_numpy(np.stack([self.texts[text[1:-1]] for text in texts]))


def by_pytrec_eval(qrels, queries, documents, scores) -> dict[str, float]:
    """Score as BEIR does: own documents are dropped, and means are over the queries of the qrels.

    MRR is BEIR's own, of the ten best; here in trec_eval's order.
    """
    run = {
        query: {d: float(s) for d, s in zip(documents, row, strict=True) if d != query}
        for query, row in zip(queries, scores, strict=True)
        if query in qrels
    }
    asked = {"ndcg_cut.10", "map_cut.100", "recall.100"}
    found = pytrec_eval.RelevanceEvaluator(qrels, asked).evaluate(run).items()
    ranked = {q: sorted(row, key=lambda d: (row[d], d), reverse=True) for q, row in run.items()}
    top = {q: {d: run[q][d] for d in row[:10]} for q, row in ranked.items()}
    reciprocal = pytrec_eval.RelevanceEvaluator(qrels, {"recip_rank"}).evaluate(top)
    names = ("ndcg_cut_10", "recip_rank", "map_cut_100", "recall_100")
    rows = [{**values, "recip_rank": reciprocal[q]["recip_rank"]} for q, values in found]
    means = [float(np.mean([row[name] for row in rows])) for name in names]
    return dict(zip(RETRIEVAL_METRICS, means, strict=True))


def cosines(queries: torch.Tensor, documents: torch.Tensor) -> np.ndarray:
    unit = [x / x.norm(dim=1, keepdim=True) for x in (queries, documents)]
    return (unit[0] @ unit[1].T).numpy()


def expected_of(case: Case) -> dict[str, float]:
    names = [[f"<{name}>" for name in row] for row in (case.queries, case.documents)]
    scores = cosines(*(case.embed(row) for row in names))
    return by_pytrec_eval(case.qrels, case.queries, case.documents, scores)


def test_random_sets_are_scored_as_pytrec_eval_scores_them(tmp_path):
    seen = []
    for seed in range(SETS):
        case = Case(seed)
        data = read_beir(case.write(tmp_path / str(seed)))
        first, second = case.embed(data.queries), case.embed(data.corpus)
        found = measure(data, first, second, {"": 16}, CPU).metrics
        assert found == pytest.approx(expected_of(case), abs=1e-9), seed
        seen.append(list(found.values()))
    assert (np.std(seen, axis=0) > 0.05).all(), "sets must differ"


def test_a_width_is_searched_once_under_all_its_names(tmp_path, monkeypatch):
    case, searched = Case(0), []

    def counting(queries, *more):
        searched.append(queries.shape[1])
        return search(queries, *more)

    monkeypatch.setattr(import_module(measure.__module__), "search", counting)
    data = read_beir(case.write(tmp_path / "set"))
    first, second = case.embed(data.queries), case.embed(data.corpus)
    found = measure(data, first, second, {"": 16, "/16": 16, "/8": 8}, CPU)
    assert searched == [16, 8]
    for name in RETRIEVAL_METRICS:
        assert found.metrics[f"{name}/16"] == found.metrics[name]
    assert found.metrics["ndcg@10/8"] != found.metrics["ndcg@10"]


def measure_shares(folder: Path) -> None:
    """Measure the sets with texts dealt to two ranks in turns."""
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    evaluation = Evaluation()
    for seed in range(SHARED):
        case, data = Case(seed), TextDataset(read_beir(folder / str(seed)))
        mine = torch.arange(rank, len(data), 2)
        embedded = case.embed([data.texts[i][1] for i in mine.tolist()])
        batch = TextBatch(mine, [], torch.arange(len(mine)))
        evaluation.add_texts(str(seed), data, batch, embedded)
    (folder / f"{rank}.json").write_text(json.dumps(evaluation.collect([], CPU)))
    torch.distributed.destroy_process_group()


def test_two_ranks_score_as_pytrec_eval_does(tmp_path):
    for seed in range(SHARED):
        Case(seed).write(tmp_path / str(seed))
    ranks = Ranks(measure_shares, tmp_path, folder=tmp_path, ranks=2)
    assert ranks.wait() == [0, 0], ranks.output()
    for rank in (0, 1):
        found = json.loads((tmp_path / f"{rank}.json").read_text())
        for seed in range(SHARED):
            values = {name: found[f"{seed}/{name}"] for name in RETRIEVAL_METRICS}
            assert values == pytest.approx(expected_of(Case(seed)), abs=1e-9), seed


@pytest.mark.slow
def test_real_sets_are_scored_as_pytrec_eval_scores_them(request):
    """Bags of words, hashed to 256 columns, hence with ties."""
    folder = request.config.getoption("--testsets")
    sets = sorted(path.parent for path in folder.glob("*/corpus.jsonl")) if folder else []
    if not sets:
        pytest.skip("no --testsets")
    for path in sets:
        check_real_set(path)


def check_real_set(path: Path) -> None:
    data = read_beir(path)
    first, second = (bags_of_words(texts) for texts in (data.queries, data.corpus))
    qrels: dict[str, dict[str, int]] = {}
    for line in (path / "qrels" / "test.tsv").read_text().splitlines()[1:]:
        query, document, grade = line.split("\t")
        qrels.setdefault(query, {})[document] = int(grade)
    scores = cosines(first, second)
    expected = by_pytrec_eval(qrels, data.query_ids, data.document_ids, scores)
    found = measure(data, first, second, {"": 256}, CPU).metrics
    assert found == pytest.approx(expected, abs=1e-9), path
    assert found["ndcg@10"] > 0


def bags_of_words(texts: list[str]) -> torch.Tensor:
    bags = np.zeros((len(texts), 256), dtype=np.float32)
    for bag, text in zip(bags, texts, strict=True):
        for word in text.lower().split():
            bag[sum(word.encode()) % 256] += 1
    return torch.from_numpy(bags)
