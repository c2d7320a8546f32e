"""A whole run: prepare, plan, train, resume, test, export, report.

    run.py               all of it, top to bottom
    texts.py             what is trained, validated and tested on
    initial_weights.py   the model before the first update
    preparation.py       device, attention, the run's identity, the plateau
    plan.py              what is said before the first update
    tokenizer.py         train-mpnet-tokenizer
    session.py           the parts that need the run's directory; hooks.py plugs them into the loop

It uses every room but demo/. Only demo/ and the command line import it.
"""
