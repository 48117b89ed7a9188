"""Rollouts for a person to read: a table on the console, whole texts in samples.jsonl."""

from training.step3_rlhf_finetuning.experience import Experience


def sample_rows(experience: Experience, tokenizer, count: int) -> list[dict]:
    """The first answers of this rank: prompt, answer, score, KL to the reference in nats, tokens, whether it ended."""
    kl = ((experience.log_probs - experience.ref_log_probs) * experience.answer_mask).sum(1).tolist()
    rows = []
    for i in range(min(count, len(experience))):
        real = experience.attention_mask[i].bool()
        ids, width = experience.input_ids[i], experience.prompt_width
        answer = ids[width:][real[width:]]
        rows.append(
            {
                "prompt": tokenizer.decode(ids[:width][real[:width]], skip_special_tokens=True),
                "answer": tokenizer.decode(answer, skip_special_tokens=True),
                "score": experience.scores[i].item(),
                "kl": kl[i],
                "tokens": len(answer),
                "ended": bool(experience.ended[i]),
                "trained": bool(experience.answer_mask[i].any()),
            }
        )
    return rows


def sample_table(rows: list[dict], width: int = 100) -> str:
    """One line per answer: the end of the prompt, the beginning of the answer, and its figures."""
    text = width - 30
    prompt_width, answer_width = text * 2 // 5, text - text * 2 // 5
    lines = [f"{'prompt':<{prompt_width}}  {'answer':<{answer_width}} {'score':>7} {'KL':>7} {'tokens':>6} end"]
    for row in rows:
        prompt = _one_line(row["prompt"])
        prompt = prompt if len(prompt) <= prompt_width else "…" + prompt[len(prompt) - prompt_width + 1 :]
        answer = _one_line(row["answer"])
        answer = answer if len(answer) <= answer_width else answer[: answer_width - 1] + "…"
        score = f"{row['score']:7.2f}" if row["trained"] else "   left"
        lines.append(
            f"{prompt:<{prompt_width}}  {answer:<{answer_width}} {score} {row['kl']:7.2f} {row['tokens']:>6} "
            f"{'yes' if row['ended'] else 'no'}"
        )
    return "\n".join(lines)


def _one_line(text: str) -> str:
    return " ".join(text.split())
