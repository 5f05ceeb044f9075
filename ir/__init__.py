"""The intermediate representation: types, ops, modules, programs, text form and reference evaluator."""
