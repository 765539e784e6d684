"""Twenty texts that people might send. Fixed: what the embedded model makes of them is compared with transformers'.

Chosen so that in 64 greedy tokens the two most likely ones are never so close that rounding on another CPU could swap
them (`MIN_MARGIN` in `e2e/reference.py`, checked whenever the reference is computed).
"""

PROMPTS = (
    "The history of the city of Rome began",
    "What is the difference between a virus and a bacterium?",
    "def fibonacci(n):\n    if n < 2:\n        return n\n",
    "Once upon a time, in a small village at the edge of a dark forest, there lived",
    "Here are five tips for a better night's sleep:\n1.",
    "La capitale de la France est",
    "2, 4, 6, 8, 10, 12,",
    "Dear hiring team,\n\nI am writing to apply for the position of",
    "The three states of matter are",
    "import numpy as np\n\n# compute the mean and the standard deviation of an array\n",
    "Q: If a train travels 60 miles in 1.5 hours, what is its average speed?\nA:",
    "Ingredients:\n- 2 cups of flour\n- 1 cup of sugar\n- 3 eggs\n\nInstructions:\n",
    "<html>\n<head>\n<title>My first page</title>\n",
    "In 1969, Neil Armstrong",
    "She opened the letter with trembling hands. Inside, she found",
    "SELECT name, age FROM users WHERE",
    "The quick brown fox jumps over the lazy dog. The lazy dog",
    "Il était une fois un petit garçon qui",
    '{"name": "Alice", "age": 30, "city":',
    "Water boils at 100 °C at sea level, but on a high mountain it boils at a lower temperature because",
)
