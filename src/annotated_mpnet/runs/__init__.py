"""A whole run: prepare, plan, train, resume, test, export, report.

    run.py               all of it, top to bottom
    texts.py             what is trained, validated and tested on
    initial_weights.py   the model before the first update
    card.py              the model card of its exports
    preparation.py       device, attention, the run's identity, the plateau
    plan.py              what is said before the first update
    masked_words.py      what the model guesses at each evaluation
    tokenizer.py         train-mpnet-tokenizer
    session.py           the parts that need the run's directory; hooks.py plugs them into the loop

It uses every room but demo/. Only demo/ and the command line import it.
"""
