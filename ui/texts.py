"""English texts of the pages, in one place."""

TITLE = "Fusebox"
TAGLINE = "Switch LLM efficiency techniques on and off, and measure on this machine what each one buys."
MODEL_HELP = "embedded (ships with the app, works offline), a hub id such as owner/name, or a local folder"
MODEL_HELP_SPACE = "embedded (ships with the app), or a hub id such as owner/name"
MESSAGE_PLACEHOLDER = "Ask a question, then watch both engines answer it. Enter sends, Shift+Enter breaks the line."
EMPTY_BASELINE = "**Baseline**\n\nThe unmodified model. Ask something below; its answer and its times are the reference."
EMPTY_FUSED = "**Fused engine**\n\nThe same model with the techniques you switch on. Its answer streams here, after or before the baseline's."
NOTHING_ON = "Switch on at least one technique to compare; only the baseline runs now."
EXAMPLES = (
    "What is artificial intelligence?",
    "Explain quantum mechanics in simple terms.",
    "How does machine learning work?",
    "Why is the sky blue?",
)
CALIBRATION_HELP = "Techniques that calibrate take this text instead of the project's own; about 50 kB for the default settings."
EMPTY_METRICS = "Metrics of both engines appear here after the first answer: times, tokens, memory and quality, each measured in the run that shows it."
AT_ONCE_HELP = "Both engines share the cores then; times are marked as not comparable."
SCORE_HELP = "Scores the baseline's answer under the fused engine, token by token: costs about as long as the answer itself."
FOOTNOTE = "Every number was measured in the run that shows it. A dash means: not measured. Point at a name for its definition."
COMPARE_IDLE = "Choose methods and queries, then press Run. Answers are measured one at a time, each method in turn; the baseline always runs too."
COMPARE_STOPPED = "stopped; Run goes on from here as long as the form is not changed"
COMPARE_EMPTY = "A row for each method and a column for each query appear here, and fill while the comparison runs."
COMPARE_NO_ADVICE = "The fastest method within your limits is named here once there are answers."
COMPARE_NO_ANSWERS = "The answers to one query stand here side by side, with what differs from the baseline's marked."
QUERY_FILE_HELP = "CSV with the columns question and, where wanted, kind, keywords (parted by ;) and id; JSON with the same names; or text with one question a line."
COMBINATIONS_HELP = "Techniques joined by +, several parted by blanks or lines; options as name:option=value. native executes what others simulate or store."
