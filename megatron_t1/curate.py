r"""RL prompts from raw question/answer data, as T1 makes its 30k: answers that rules can verify, no question twice and
none of an evaluation set, and of those the ones that the model does not solve already (pass rate at most 0.3 of 16).

    raw files -> clean -> candidates.jsonl -> sample 16 each -> sampled.jsonl -> select -> curate.output

`clean` needs no model. What it or `select` drops, for a reason of `REASONS`, is a line of dropped.jsonl. `sample`
asks the servers as RL will, several questions at a time; a question is written down when its last sample is graded, and
is never asked again. Its seed is a function of (seed, question), so an interrupted run, resumed, ends in the same file
as one that was not. Everything lies in run_dir/curate.

Left out: solutions (RL does not need them) and judging by a model what rules cannot judge.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NotRequired, TypedDict

from tqdm import tqdm

from megatron_t1 import plugins
from megatron_t1.config import CurateConfig
from megatron_t1.data.config import QUESTION_SETS
from megatron_t1.data.dedup import EvaluationQuestions, TrainingQuestions, template_words, words
from megatron_t1.data.prompts import is_missing
from megatron_t1.data.sets import file_of, load_question_texts, parse_file
from megatron_t1.evaluation.resume import check_settings, collecting, prompts_identity
from megatron_t1.evaluation.samplers import sample_seed
from megatron_t1.files import read_json, read_jsonl, write_json, write_jsonl
from megatron_t1.rank0 import Rank0
from megatron_t1.reward.answers import extract
from megatron_t1.reward.answers.numbers import answer_key
from megatron_t1.reward.answers.verify import verify_cheaply
from megatron_t1.reward.config import RewardConfig
from megatron_t1.reward.score import Scorer
from megatron_t1.rollout.config import SamplingConfig
from megatron_t1.types import Prompt, Sample
from megatron_t1.warn import warn
from megatron_t1.weights.folder_digest import weights_digest

REASONS = {
    "no_question": "the question is missing or empty",
    "no_answer": "no answer field, and no box in the solution",
    "proof": "a proof is asked for",
    "multi_part": "several questions in one",
    "multiple_choice": "options to choose from: guessing is rewarded",
    "needs_image": "the question shows an image",
    "unverifiable": "rules cannot tell other spellings of the answer from wrong ones",
    "in_evaluation": "the same question is in an evaluation set",
    "near_evaluation": "a question of an evaluation set is in it, nearly word for word",
    "duplicate": "the same question came before",
    "near_duplicate": "nearly the same question with the same answer came before",
    "contradicted": "the same question is there with another answer: one of the two is wrong",
    "too_long": "prompt and response do not fit into the model's context",
    "too_easy": "solved more often than curate.max_pass_rate",
    "never_solved": "solved in no sample (curate.drop_never_solved)",
}
_OF_SAMPLING = ("too_long", "too_easy", "never_solved")
_PROOF = re.compile(r"\b(?:prove|show|verify|demonstrate|justify)\s+that\b|^\s*prove\b|证明", re.I)
_NO_ANSWER = re.compile(r"(?:proof|notfound|not found|none given|n/?a|see (?:the )?(?:solution|proof)|qed)\.?", re.I)
_PARTS = re.compile(r"(?:^|[\s:.;])\(?(?:a|i|1)\)[.\s](.*?)(?:^|[\s:.;?])\(?(?:b|ii|2)\)[.\s](.*)", re.S | re.I)
_ASKS = re.compile(r"\?|^\s*(?:find|determine|calculate|compute|prove|show|give|solve|evaluate|what|how)\b", re.I)
_OPTIONS = re.compile(r"(?:\(A\)|(?:^|\s)A[.):]\s).{1,400}?(?:\(B\)|\sB[.):]\s).{1,400}?(?:\(C\)|\sC[.):]\s)", re.S)
_DRAWING = re.compile(r"\[asy\].*?\[/asy\]", re.S)
_IMAGE = re.compile(r"!\[[^\]]*\]\(|\\includegraphics|<img\b|https?://\S+\.(?:png|jpe?g|gif|svg)", re.I)
_GSM8K_ANSWER = re.compile(r"####\s*(\S.*?)\s*$")
_SHOWN = 100


@dataclass(frozen=True, kw_only=True)
class _Question:
    """A raw question that may become a prompt."""

    name: str
    source: str
    text: str
    gold: str


def clean(cfg: CurateConfig, reward: RewardConfig, folder: Path, sets_dir: Path | None) -> Counter[str]:
    """Write candidates.jsonl and dropped.jsonl; returns how many were read, dropped for each reason, and left.

    Raises:
        ValueError: a row can't be read, or one of an evaluation set has no question.
    """
    if not cfg.inputs:
        raise ValueError("curate.inputs is empty: give it files of questions and answers")
    evaluation = EvaluationQuestions(cfg.min_evaluation_share)
    if not cfg.evaluation:
        warn(
            "curate.evaluation is empty: nothing keeps the questions that the model will be measured on out of its "
            "training; name their sets or files"
        )
    for name in cfg.evaluation:
        rows = load_question_texts(name, sets_dir=sets_dir, field=cfg.question_field)
        template = template_words([texts[0] for _, texts in rows])
        for row_name, texts in rows:
            evaluation.add(row_name, texts[0], *template)
            for text in texts[1:]:
                evaluation.add(row_name, text)
        different = len({tuple(map(words, texts)) for _, texts in rows})
        if 2 * different < len(rows):
            warn(
                f"curate.evaluation: {name} has {len(rows)} rows and {different} different questions: "
                f"does it ask them in curate.question_field = {cfg.question_field}?"
            )
    seen = TrainingQuestions(cfg.min_duplicate_similarity)
    questions: list[_Question] = []
    dropped: list[dict[str, Any]] = []

    def drop(name: str, reason: str, text: str, detail: Any = None) -> None:
        dropped.append(_dropped(name, reason, text, detail))

    names: set[str] = set()
    counts: Counter[str] = Counter()
    for path in map(Path, cfg.inputs):
        for number, row in tqdm(_rows(path), desc=f"read {path.name}", unit="question"):
            counts["read"] += 1
            name = _name_of(cfg, row, path, number)
            while name in names:  # more than once where several files have one name
                name = f"{path.stem}-{number}-{name}"
            names.add(name)
            text, gold = _question_of(cfg, row), _answer_of(cfg, row)
            if reason := _unusable(cfg, text, gold):
                drop(name, reason, text, gold[:_SHOWN] or None)
            else:
                source = row.get("source")
                source = source if isinstance(source, str) and source else path.name
                questions.append(_Question(name=name, source=source, text=text, gold=gold))
    candidates: dict[str, _Question] = {}
    contradicted: dict[str, tuple[str, str]] = {}
    with Scorer(reward) as scorer:
        problems = scorer.check_golds(question.gold for question in questions)
        for question, problem in zip(questions, tqdm(problems, "check", len(questions), unit="question"), strict=True):
            if problem is not None:
                drop(question.name, "unverifiable", question.text, f"{question.gold[:_SHOWN]}: {problem}")
            elif overlap := evaluation.find(question.text):
                drop(question.name, "in_evaluation" if overlap[1] == 1 else "near_evaluation", question.text, overlap)
            elif twin := seen.find_or_add(question.name, question.text, answer_key(question.gold)):
                if twin[1] == 1 and _contradict(question.gold, candidates[twin[0]].gold):
                    contradicted[question.name] = twin[0], candidates[twin[0]].gold
                    contradicted[twin[0]] = question.name, question.gold
                    drop(question.name, "contradicted", question.text, contradicted[question.name])
                else:
                    drop(question.name, "duplicate" if twin[1] == 1 else "near_duplicate", question.text, twin)
            else:
                candidates[question.name] = question
    for name in [name for name in candidates if name in contradicted]:
        drop(name, "contradicted", candidates.pop(name).text, contradicted[name])
    write_jsonl(folder / "dropped.jsonl", dropped)
    write_jsonl(
        folder / "candidates.jsonl",
        (
            {"id": q.name, "prompt": q.text + cfg.prompt_suffix, "answer": q.gold, "source": q.source}
            for q in candidates.values()
        ),
    )
    return counts + Counter(row["reason"] for row in dropped)


def _contradict(gold: str, other: str) -> bool:
    """Two answers of one question are plainly not the same; False when only a computer algebra could tell."""
    verdict, _ = verify_cheaply(gold, other, "answer")
    return verdict is not None and verdict.outcome != "correct"


def _rows(path: Path) -> list[tuple[int, dict[str, Any]]]:
    """(line or row number, row) of every row."""
    return parse_file(path, lambda row, number: (number, row))


def _name_of(cfg: CurateConfig, row: dict[str, Any], path: Path, number: int) -> str:
    name = row.get(cfg.id_field)
    return str(name) if type(name) in (str, int) and name != "" else f"{path.stem}-{number}"


def _question_of(cfg: CurateConfig, row: dict[str, Any]) -> str:
    for name in (cfg.question_field, "prompt", "question"):
        if isinstance(row.get(name), str) and not is_missing(row[name]):
            return str(row[name]).strip()
    return ""


def _answer_of(cfg: CurateConfig, row: dict[str, Any]) -> str:
    """The answer field; or the solution's last box, or what stands after #### in GSM8K. '' when there is none."""
    answer = row.get(cfg.answer_field)
    is_number = isinstance(answer, (int, float)) and not isinstance(answer, bool) and -math.inf < answer < math.inf
    if is_number or (isinstance(answer, str) and not is_missing(answer)):
        text = str(answer).strip()
        if marked := _GSM8K_ANSWER.search(text):
            return marked[1]
        return (extract.last_box(text) or "") if extract.BOX.search(text) else _bare(text)
    solution = row.get(cfg.solution_field)
    return (extract.last_box(solution) or "") if isinstance(solution, str) else ""


def _bare(text: str) -> str:
    """Without the dollars around a formula; one behind a backslash is money."""
    text = text.lstrip("$ ")
    bare = text.rstrip("$ ")
    return bare + "$" if bare.endswith("\\") and text[len(bare) :].startswith("$") else bare


def _unusable(cfg: CurateConfig, text: str, gold: str) -> str | None:
    """The first of `REASONS` that is plain from the words."""
    text = _DRAWING.sub(" ", text)
    parts = _PARTS.search(text)
    letter = re.fullmatch(r"(?:\\text(?:bf)?\{)?\(?[A-E]\)?\}?", gold)
    tests = {
        "no_question": not text,
        "proof": bool(_PROOF.search(text)) or gold.casefold().strip(".") == "proof",
        "no_answer": not gold or bool(_NO_ANSWER.fullmatch(gold)),
        "needs_image": bool(_IMAGE.search(text)),
        "multiple_choice": not cfg.keep_multiple_choice and bool(letter or _OPTIONS.search(text)),
        "multi_part": bool(parts and _ASKS.search(parts[1]) and _ASKS.search(parts[2])),
    }
    return next((reason for reason, hit in tests.items() if hit), None)


def prepare(
    cfg: CurateConfig, reward: RewardConfig, folder: Path, *, sets_dir: Path | None = None, resume: bool
) -> dict[str, int]:
    """`clean`, or with `resume` what it left in `folder`; the counts.

    Raises:
        ValueError: see `clean`; or the folder holds a curation that was not asked to go on, or of something else.
    """
    counts_path = folder / "cleaned.json"
    files = {name: Path(name) for name in cfg.inputs}
    files |= {name: file_of(name, sets_dir) for name in cfg.evaluation if name not in QUESTION_SETS}
    settings = {
        "files": {name: _digest(path) for name, path in files.items()},
        **{f"curate.{name}": value for name, value in asdict(cfg).items() if name not in _MAY_CHANGE},
    }
    if own := [name for name in cfg.evaluation if name in QUESTION_SETS]:
        settings["plugins"] = plugins.identity(QUESTION_SETS.modules[name] for name in own)
    if counts_path.exists():
        check_settings(folder / "settings.json", settings, resume=resume, elsewhere="another run_dir")
    else:
        counts = clean(cfg, reward, folder, sets_dir)
        write_json(folder / "settings.json", settings)
        write_json(counts_path, counts)
    return read_json(counts_path, dict[str, int])


_MAY_CHANGE = ("output", "max_pass_rate", "drop_never_solved", "clean_only", "num_samples", "inputs", "evaluation")


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class _Candidate(TypedDict):
    id: str
    prompt: str


class _Dropped(TypedDict):
    id: str
    reason: str


def _dropped(name: str, reason: str, text: str, detail: Any) -> dict[str, Any]:
    return {"id": name, "reason": reason, "detail": detail, "question": text[: _SHOWN * 5]}


class _Sampled(TypedDict):
    id: str
    pass_rate: float | None
    share_cut: NotRequired[float]


def sample(sampling: SamplingConfig, rank0: Rank0, prompts: list[Prompt], folder: Path, seed: int) -> None:
    """Measure the pass rate of every prompt that has none in sampled.jsonl yet; None for those that are too long.
    Beside it stands the share of its samples that were cut at `max_new_tokens`: few of them have an answer.

    Raises:
        ValueError: sampled.jsonl is of another model, sampling, seed or rendering of the prompts.
    """
    path, weights = folder / "sampled.jsonl", weights_digest(Path(rank0.servers.model_dir))
    settings = {
        "weights": weights,
        "sampling": sampling.identity(),
        "seed": seed,
        "reward": rank0.scorer.cfg.deciding(),
    }
    settings["prompts"] = prompts_identity(prompts)
    check_settings(folder / "sampling.json", settings, resume=True, elsewhere="another run_dir")
    # Those that were too long are not done: this time the servers may take longer ones.
    rows = [row for row in read_jsonl(path, _Sampled) if row["pass_rate"] is not None]
    write_jsonl(path, rows)
    done = {row["id"] for row in rows}
    left = [prompt for prompt in prompts if prompt.id not in done]
    max_tokens = min(server.max_model_len for server in rank0.servers.usable())
    fitting = [p for p in left if len(p.token_ids) + sampling.max_new_tokens <= max_tokens]
    fits = {prompt.id for prompt in fitting}
    graded: dict[int, list[Sample]] = {}

    def note(i: int, _: int, samples: list[Sample]) -> None:
        graded.setdefault(i, []).extend(samples)
        if len(graded[i]) == sampling.num_samples:
            every = graded.pop(i)
            correct = sum(sample.reward is not None and sample.reward.correct for sample in every)
            cut = sum(sample.finish_reason == "length" for sample in every)
            row = {"id": fitting[i].id, "pass_rate": correct / len(every), "share_cut": cut / len(every)}
            add([row], sum(len(sample.token_ids) for sample in every))

    counts, seeds = [sampling.num_samples] * len(fitting), [sample_seed(seed, prompt.id) for prompt in fitting]
    with collecting(path, "sample", unit="question", num_kept=len(done), num_missing=len(left)) as add:
        add([{"id": prompt.id, "pass_rate": None} for prompt in left if prompt.id not in fits], 0)
        rank0.client.generate_each(fitting, counts, seeds, sampling, rank0.scorer.score, note)


def select(cfg: CurateConfig, folder: Path, counts: dict[str, int]) -> tuple[Path, str]:
    """Write the prompts that are kept; returns their file and a table of what became of all.

    Raises:
        ValueError: none is kept.
    """
    candidates = read_jsonl(folder / "candidates.jsonl", _Candidate)
    kept = candidates
    fates = Counter(counts)
    share_cut = None
    if not cfg.clean_only:
        sampled = read_jsonl(folder / "sampled.jsonl", _Sampled)
        rates = {row["id"]: row["pass_rate"] for row in sampled}
        cuts = [row["share_cut"] for row in sampled if row["pass_rate"] is not None]
        share_cut = sum(cuts) / max(1, len(cuts))
        kept = []
        # A selection before, by another rate, has left lines of its own.
        dropped = [row for row in read_jsonl(folder / "dropped.jsonl", _Dropped) if row["reason"] not in _OF_SAMPLING]
        for row in candidates:
            rate = rates[row["id"]]
            if rate is None:
                reason = "too_long"
            elif rate > cfg.max_pass_rate:
                reason = "too_easy"
            elif rate == 0 and cfg.drop_never_solved:
                reason = "never_solved"
            else:
                kept.append({**row, "pass_rate": rate})
                continue
            fates[reason] += 1
            dropped.append(_dropped(row["id"], reason, row["prompt"], rate))
        write_jsonl(folder / "dropped.jsonl", dropped)
    path = Path(cfg.output or folder / "prompts.jsonl")
    fates["kept"] = len(kept)
    write_json(folder / "summary.json", {**fates, "share_cut": share_cut})
    lines = [f"{'read':<16} {fates['read']:>9,}"]
    lines += [f"- {name:<14} {fates[name]:>9,}  {why}" for name, why in REASONS.items() if fates[name]]
    lines.append(f"{'kept':<16} {fates['kept']:>9,}  {path}")
    if share_cut is not None:
        lines.append(f"{share_cut:.1%} of the samples were cut at sampling.max_new_tokens: not solved if unanswered")
    table = "\n".join(lines)
    if not kept:
        path.unlink(missing_ok=True)  # of an earlier selection
        raise ValueError(f"no question is kept, and {path} is not written:\n{table}")
    write_jsonl(path, kept)
    return path, table
