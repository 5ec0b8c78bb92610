"""The groups of the configuration, one dataclass each.

Defaults here are the only defaults: the YAML files under ``configs/`` hold choices, not copies of these values.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class ModelConfig:
    """Which Qwen3, and how it is held in memory.

    Attributes:
        path: Hugging Face directory (``config.json``, tokenizer, safetensors) or Hub name. Its ``config.json`` decides
            every dimension.
        checkpoint: Megatron checkpoint directory to take the initial weights from instead of ``path``'s safetensors.
        backend: ``transformer_engine`` (CUDA), ``torch`` (CPU and CUDA), or ``auto``: the former where it can be used.
        dtype: Parameter dtype; the optimizer and all reductions of the loss are float32 either way.
        recompute: What backward computes again instead of keeping its activations: ``selective`` the MLPs (or experts),
            whose activations are the largest of a layer; ``full`` whole layers.
        max_length: Longest sequence (prompt and response, either role) in tokens; ``None``: the model's
            ``max_position_embeddings``.
    """

    path: str = ""
    checkpoint: str | None = None
    backend: str = "auto"
    dtype: str = "bfloat16"
    recompute: str = "none"
    max_length: int | None = None


@dataclass
class ParallelConfig:
    """The mesh. Data parallelism takes what is left: world size / (tensor * pipeline * context).

    Experts lie on the same ranks in another way: within a stage, ``expert`` ranks hold different experts and
    ``expert_tensor`` ranks parts of the same ones; what is left holds copies.

    Attributes:
        tensor: Tensor-parallel size; divides the model's attention heads and FFN rows, and divides its key/value heads
            or is a multiple of them. As a multiple, every layer gathers queries, keys and values from all ranks, and
            adapters (``lora``) cannot be on their projections.
        pipeline: Pipeline stages. Where they do not divide the model's layers, the last ones hold one layer fewer.
        virtual_stages: Chunks of the model on each pipeline rank (Megatron's interleaved schedule). Above 1,
            micro-batches pass round the ranks so many times, and the pipeline idles less at both ends of a step.
        context: Ranks that each sequence is split over, for long ones. Every sequence is padded to a multiple of twice
            this.
        expert: Expert-parallel size; divides the model's experts. 1 for a model without experts.
        expert_tensor: Parts into which an expert is cut; ``None``: ``tensor``.
        sequence: Shard activations outside attention and MLP along the sequence (needs ``tensor > 1``, and goes with
            it for a model with experts).
        distributed_optimizer: Shard optimizer state over data-parallel ranks.
        timeout_minutes: How long ranks wait for one another before the job is given up as hung. It must exceed what a
            healthy rank may lag behind the others: in sampling (replicas of the engine finish at different times),
            while rank 0 judges answers or makes a checkpoint durable, and at the start, where one node downloads or
            reads a model that another has cached.
    """

    tensor: int = 1
    pipeline: int = 1
    virtual_stages: int = 1
    context: int = 1
    expert: int = 1
    expert_tensor: int | None = None
    sequence: bool = False
    distributed_optimizer: bool = True
    timeout_minutes: int = 30

    @property
    def expert_parts(self) -> int:
        """Parts into which an expert is cut."""
        return self.tensor if self.expert_tensor is None else self.expert_tensor


@dataclass
class ObjectiveConfig:
    """What is minimised.

    The defaults of ``beta``, ``clip`` and ``clip_mode`` come from docs/results.md, "Choosing a divergence": of the
    settings that learn about equally well, the one that is hurt least by references that belong to other problems.

    Attributes:
        name: ``opsd`` (divergence to the teacher on the student's own rollouts), ``sampled_token`` (its policy gradient
            on the sampled tokens alone), ``sft`` (cross-entropy on given responses), ``grpo`` (policy gradient on
            verified answers) or ``opsd_grpo`` (the sum of ``opsd`` and ``grpo``).
        beta: 0 is forward KL(teacher || student), 1 reverse KL, in between generalized Jensen-Shannon.
        clip: Upper clip tau; ``None`` for no clip.
        clip_mode: Where the clip acts, see ``losses.divergences``; ``none`` ignores ``clip``.
        reduction: ``token``: mean over all response tokens of the step. ``sequence``: mean over sequences of their
            mean per token, as the paper writes it.
        top_k: Take the divergence over this many most likely entries of one side only; ``None``: over all of them.
        top_k_side: Whose most likely entries these are: ``teacher`` or ``student``.
        top_k_tail: ``bucket`` counts all other entries as one; ``renormalise`` leaves them out.
        importance_cap: Weigh each token by ``min(p / p_engine, cap)``, its probability now over that with which the
            engine sampled it, where objectives learn from rollouts; ``None``: no such weights. It makes up for what
            engine and trainer compute differently. 2 is usual; at least 1, which the weights are where they agree.
        position_floor: Let a token's weight grow with its place in the response, from near this one to near 1 (PW-OPSD,
            arXiv 2605.21606: 0.25): ``floor + (1 - floor) sigmoid((place - midpoint) / width)``, where ``place`` runs
            from 0 to 1. ``None``: weights of 1.
        position_midpoint: Place where the weight is half-way (PW-OPSD: 0.3).
        position_width: How gradually it grows (PW-OPSD: 0.1).
        entropy_gate: Leave out the divergence of tokens by the teacher's entropy: what counts as high, in nats;
            ``None``: leave out none.
        entropy_gate_keep: ``low``: keep tokens whose entropy is at most ``entropy_gate``, where the teacher is sure.
            ``high``: keep the others.
        log_ratio_clip: ``sampled_token``: bound on ``|log p_T - log p_S|`` of a token; ``None`` for none.
        ratio_clip_low: ``grpo`` with ``train.updates_per_step`` above 1: how far a token's ratio to its probability
            before the step's first update may fall below 1 before its gradient ends.
        ratio_clip_high: How far it may rise above 1.
        advantage_std: ``grpo``: divide a reward's distance from its group's mean by the group's standard deviation;
            ``false`` leaves it, as in Dr. GRPO (arXiv 2503.20783).
        grpo_weight: ``opsd_grpo``: factor on the ``grpo`` part.
        chunk_rows: Rows whose logits exist at a time; ``None``: chosen by the loss.
    """

    name: str = "opsd"
    beta: float = 0.5
    clip: float | None = 0.05
    clip_mode: str = "entry"
    reduction: str = "token"
    top_k: int | None = None
    top_k_side: str = "teacher"
    top_k_tail: str = "bucket"
    importance_cap: float | None = None
    position_floor: float | None = None
    position_midpoint: float = 0.3
    position_width: float = 0.1
    entropy_gate: float | None = None
    entropy_gate_keep: str = "low"
    log_ratio_clip: float | None = None
    ratio_clip_low: float = 0.2
    ratio_clip_high: float = 0.2
    advantage_std: bool = True
    grpo_weight: float = 1.0
    chunk_rows: int | None = None


@dataclass
class DataConfig:
    """Problems and how they are shown to the two roles.

    Attributes:
        train: JSONL or Parquet file, directory of Parquet files, or Hub name with an optional ``:split``.
        eval: The same for held-out problems, or a known set by its name, see ``evaluation_sets.yaml``; ``None``: none.
        problem_column: Column with the statement.
        solution_column: Column with the reference solution.
        answer_column: Column with the final answer, which has to exist where answers are needed; ``None``: the column
            ``answer``, if there is one. A row without an answer has that of the solution's last ``\\boxed{}``.
        response_column: Column with the supervised target; ``None``: the solution column.
        role_column: Column saying whose prompt the supervised target follows; ``None``: the student's.
        student_template: File with the student's user message; ``None``: the packaged ``prompts/student.txt``.
        teacher_template: File with the teacher's user message; ``None``: the packaged one for ``privileged``.
        student_thinking: ``enable_thinking`` of the student's chat template.
        teacher_thinking: ``enable_thinking`` of the teacher's chat template.
        boundary: What the response follows in the teacher's prompt: its ``own`` header, or the ``student``'s, so that
            both roles read the response after the same tokens (see ``data.prompts``).
        privileged: What the teacher sees beyond the problem: the ``reference``, the ``answer`` alone, ``siblings``
            (correct rollouts of the same problem teach the failed ones), ``none`` (control: the student's own message,
            and its whole prompt where ``student_thinking`` is ``teacher_thinking`` or ``boundary`` is ``student``), or
            ``shuffled`` (control: the reference of another problem). See ``data.privileged``.
        teach_correct: With ``siblings``: train on correct rollouts too, each shown another correct one.
        sibling_thoughts: With ``siblings``: show a sibling's thinking too, not only what it says after it.
        analyse_first: Before the teacher scores a response, the student's current weights write an analysis of what the
            teacher sees, which becomes a turn of the teacher's prompt ahead of its final instruction.
        analysis_template: File with the message that asks for the analysis; ``None``: the packaged
            ``prompts/analysis.txt``.
        after_analysis_template: File with the final instruction after the analysis; ``None``: the packaged
            ``prompts/after_analysis.txt``.
        analysis_thinking: ``enable_thinking`` of the analysis; what is thought counts as its tokens, but is not shown.
        analysis_max_tokens: Longest analysis in tokens; sampled otherwise as ``rollout`` says.
        max_prompt_tokens: Longest student prompt, in training and evaluation; ``None``: whatever leaves room for the
            response. A longer one is an error, named by its line. A teacher prompt that does not fit has its
            *reference* shortened.
        shuffle: Draw problems in a seeded random order, a new one each epoch.
    """

    train: str = ""
    eval: str | None = None
    problem_column: str = "problem"
    solution_column: str = "solution"
    answer_column: str | None = None
    response_column: str | None = None
    role_column: str | None = None
    student_template: str | None = None
    teacher_template: str | None = None
    student_thinking: bool = False
    teacher_thinking: bool = True
    boundary: str = "own"
    privileged: str = "reference"
    teach_correct: bool = False
    sibling_thoughts: bool = False
    analyse_first: bool = False
    analysis_template: str | None = None
    after_analysis_template: str | None = None
    analysis_thinking: bool = False
    analysis_max_tokens: int = 512
    max_prompt_tokens: int | None = None
    shuffle: bool = True


@dataclass
class RolloutConfig:
    """How the student's responses are sampled.

    Attributes:
        engine: ``vllm``, or ``scripted`` (responses read from ``script``, for tests that need fixed ones).
        script: JSONL file of scripted responses, one object with ``prompt_ids`` and ``token_ids`` (and optionally
            ``log_probs``) a line.
        tensor: Tensor-parallel size of the engine; ``None``: ``parallel.tensor``. Engine groups tile the world.
        temperature: Sampling temperature; the loss uses the same one.
        top_p: Nucleus mass.
        top_k: Candidates kept; -1 for all.
        max_new_tokens: Longest response in tokens.
        samples_per_problem: Responses drawn for each problem.
        memory_fraction: Share of device memory the engine may take (CUDA only).
        kv_cache_gib: Size of the key/value cache on CPU, in GiB a rank; ``None``: room for a step's responses at full
            length, with an evaluation for 256 sequences; up to 1 GiB, or what a single sequence takes if that is more.
        enforce_eager: Skip the engine's graph capture and compilation (CUDA only; on CPU it is always skipped).
        max_log_prob_gap: Stop the run, before the update, where the engine's log-probs of the step's responses differ
            from the trainer's by more than this on average; ``None`` only logs it. The default lets any precision
            pass and stops at weights that are not the trainer's. ``objective.importance_cap`` together with top-p or
            top-k leaves nothing to compare: there is no check then.
        sleep_level: Where the engine's weights are while it sleeps (CUDA): 1 in host memory; 2 nowhere, since each sync
            sends them anew. 2 is tried once at the start and must bring back the same log-probs.
        save: Write each step's rollouts to ``output_dir/rollouts/``.
    """

    engine: str = "vllm"
    script: str | None = None
    tensor: int | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1
    max_new_tokens: int = 1024
    samples_per_problem: int = 1
    memory_fraction: float = 0.4
    kv_cache_gib: float | None = None
    enforce_eager: bool = False
    max_log_prob_gap: float | None = 0.5
    sleep_level: int = 1
    save: bool = True

    @property
    def truncated(self) -> bool:
        """Whether some candidates are never sampled."""
        return self.top_p < 1 or self.top_k != -1


@dataclass
class OptimizerConfig:
    """AdamW and its schedule.

    Attributes:
        lr: Peak learning rate.
        min_lr: Learning rate at the end of the decay.
        beta1: First-moment decay.
        beta2: Second-moment decay.
        eps: Denominator term.
        weight_decay: Decoupled weight decay, on matrices only.
        clip_grad: Global gradient norm above which gradients are scaled down; 0 disables.
        schedule: Shape of the decay from ``lr`` to ``min_lr`` after warm-up.
        warmup_steps: Steps of linear warm-up from 0.
        decay_steps: Step at which ``min_lr`` is reached; ``None``: ``train.steps``.
    """

    lr: float = 5e-6
    min_lr: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip_grad: float = 1.0
    schedule: str = "constant"
    warmup_steps: int = 0
    decay_steps: int | None = None


@dataclass
class TrainConfig:
    """The loop.

    Attributes:
        steps: Optimizer steps of the whole run, those before a resume included.
        problems_per_step: Problems drawn each step, over the whole world.
        updates_per_step: Optimizer updates on a step's rollouts, each on an equal share of them, for objectives whose
            ratio makes up for the distance that the weights have moved meanwhile. The schedule counts steps.
        tokens_per_micro_batch: Token budget of a micro-batch (the longer of its two sides), over all of the
            ``parallel.context`` ranks that share it; a sample longer than the budget gets a micro-batch of its own.
        seed: Seeds data order, sampling and initialisation.
        offload: While the engine samples, keep the optimizer's state in host memory and free the gradient buffers (bf16
            on CUDA; of a float32 model only the latter). Costs two copies a step.
    """

    steps: int = 100
    problems_per_step: int = 32
    updates_per_step: int = 1
    tokens_per_micro_batch: int = 16384
    seed: int = 0
    offload: bool = False


@dataclass
class EvaluationConfig:
    """Evaluation with the rollout engine, in training or stand-alone (``opsd_megatron.evaluate``).

    Attributes:
        sets: What to evaluate on where it is more than ``data.eval``: known sets, ``NAME@SOURCE`` or sources, see
            ``evaluation_sets.yaml``; empty: ``data.eval``.
        every: Steps between evaluations in training; 0 for none in between.
        at_start: Evaluate before the first step.
        at_end: Evaluate after the last step.
        max_problems: Use only the first so many problems; ``None`` for all.
        samples_per_problem: Responses drawn for each problem, the ``n`` of avg@n; pass@k and maj@k are for ``k`` up to
            it.
        responses_per_call: Responses drawn in one call of the engine, on all its replicas together, all of a problem in
            one call. What is drawn is judged and on disk before the next call, so a kill costs one call and memory is
            bounded by one; but the engine idles while the last responses of a call come in. It does not change what is
            drawn.
        temperature: Sampling temperature; 0 is greedy.
        top_p: Nucleus mass.
        top_k: Candidates kept; -1 for all.
        max_new_tokens: Longest response; ``None``: ``rollout.max_new_tokens``.
        max_length: Longest sequence (prompt and response) in tokens, apart from training's ``model.max_length``; the
            engine takes the longer of the two. ``None``: as long as the longest prompt and its response need, up to the
            model's ``max_position_embeddings``.
        judge_seconds: Time limit on judging one answer, of training rollouts too where the objective has them judged.
        thinking: ``enable_thinking`` of the prompts; ``None``: ``data.student_thinking``.
    """

    sets: list[str] = field(default_factory=list)
    every: int = 0
    at_start: bool = True
    at_end: bool = True
    max_problems: int | None = None
    samples_per_problem: int = 4
    responses_per_call: int = 1024
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1
    max_new_tokens: int | None = None
    max_length: int | None = None
    judge_seconds: float = 5.0
    thinking: bool | None = None


@dataclass
class TelemetryConfig:
    """What a run says of itself, beside what it always does.

    Attributes:
        peak_tflops: What one GPU can do at most in the model's dtype, in 10^12 operations a second, for ``mfu`` in
            ``metrics.jsonl``; ``None``: by the GPU's name where ``trainer.flops`` lists it, else no ``mfu``.
    """

    peak_tflops: float | None = None


@dataclass
class CheckpointConfig:
    """Saving and resuming.

    Attributes:
        every: Steps between checkpoints; 0 saves only at the end.
        keep: Newest checkpoints kept; older ones are deleted after a newer one is complete. ``None`` keeps all.
        at_end: Save after the last step.
        resume: Continue from the newest complete checkpoint in ``output_dir``; where there is none, start.
    """

    every: int = 25
    keep: int | None = None
    at_end: bool = True
    resume: bool = False
