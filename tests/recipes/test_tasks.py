"""What each recipe makes of its rows: prompt, target, gold answer, and what it refuses."""

import json

import pytest

from galore_trainer.errors import OptionError
from galore_trainer.metrics.answers import EXTRACTIONS
from galore_trainer.recipes import gsm8k, mawps, score, sft
from galore_trainer.recipes.sources import Row


def rows(*fields):
    return [Row(f, f"line {i}", f"f:{i}", "data.source", "f.jsonl") for i, f in enumerate(fields, start=1)]


def question(example):
    return example.messages[-1]["content"]


class TestGsm8k:
    def test_annotations_leave_the_target_and_are_counted(self):
        answer = "She sold 48/2 = <<48/2=24>>24 clips in May. \nIn all 48+24 = <<48+24=72>>72.\n#### 72"
        parsed = gsm8k.parse(rows({"question": " How many? ", "answer": answer}))
        example = parsed.examples[0]
        assert question(example) == "How many?"
        assert example.target == "She sold 48/2 = 24 clips in May.\nIn all 48+24 = 72.\n#### 72"
        assert example.answer == "72"
        assert parsed.notes == ["2 calculator annotations <<...>> taken out of the solutions"]

    def test_thousands_and_signs(self):
        parsed = gsm8k.parse(rows({"question": "q", "answer": "#### 1,200"}, {"question": "q", "answer": "x\n####-5"}))
        assert [e.answer for e in parsed.examples] == ["1200", "-5"]
        assert [e.target for e in parsed.examples] == ["#### 1,200", "x\n#### -5"]

    @pytest.mark.parametrize(
        ("written", "gold"),
        [
            ("$5.00", "5"),
            ("+5", "5"),
            ("1e3", "1000"),
            ("1_000", "1000"),
            ("1 234", "1234"),
            ("-$7", "-7"),
            (".5", "0.5"),
            ("20%", "20"),
            ("12.", "12"),
            ("1,234,567", "1234567"),
            ("3.50", "3.5"),
        ],
    )
    @pytest.mark.parametrize("mark", ["#### ", "####", "####   "])
    def test_the_target_of_any_spelling_scores_as_right(self, mark, written, gold):
        example = gsm8k.parse(rows({"question": "q", "answer": f"so\n{mark}{written}"})).examples[0]
        assert example.answer == gold
        result = score("gsm8k", [example.target], [example])
        assert all(result[f"exact_match_{name}"]["correct"] == 1 for name in EXTRACTIONS)

    def test_an_earlier_number_that_scoring_would_read_is_refused(self):
        with pytest.raises(OptionError, match=r"f\.jsonl.*one '#### number' alone.*line 1"):
            gsm8k.parse(rows({"question": "q", "answer": "#### 3\nno:\n#### 4"}))

    @pytest.mark.parametrize(
        "answer", ["no mark: 72", "#### 1,2", "#### 12 34", "#### 1.234,56", "#### 1e999", "#### seventy", "####"]
    )
    def test_solution_without_a_number_names_the_line(self, answer):
        with pytest.raises(OptionError, match=r"f\.jsonl.*'#### number' in field 'answer' of line 2.*data\.task=sft"):
            gsm8k.parse(rows({"question": "q", "answer": "#### 1"}, {"question": "q", "answer": answer}))


class TestMawps:
    def row(self, text="q ?", equation="x=3*6", ans=18.0):
        return {"id": 1, "original_text": text, "segmented_text": text, "equation": equation, "ans": ans}

    def test_target_from_the_equation(self):
        parsed = mawps.parse(rows(self.row("A waiter had 22 customers . How many ?", "X=((22.0-14.0)/4.0)", 2.0)))
        assert question(parsed.examples[0]) == "A waiter had 22 customers. How many?"
        assert parsed.examples[0].target == "(22 - 14) / 4 = 2\n#### 2"
        assert parsed.examples[0].answer == "2"

    def test_answers_of_mixed_types(self):
        parsed = mawps.parse(
            rows(
                self.row(ans="18"),
                self.row(ans="18.0"),
                self.row(ans=18),
                self.row(equation="x=11/6", ans="1.8333333333333333"),
            )
        )
        assert [e.answer for e in parsed.examples] == ["18", "18", "18", "1.8333333333333333"]
        assert parsed.examples[3].target == "11 / 6 = 1.8333\n#### 1.8333"

    @pytest.mark.parametrize("answer", [0.99999999, 0.00012345, 1e-9, 9.99999e-5, 1234.56789, 2e15, -0.5, 1 / 3, 1e22])
    def test_the_target_of_any_number_scores_as_right(self, answer):
        example = mawps.parse(rows(self.row(equation=f"x={answer:.17f}", ans=answer))).examples[0]
        result = score("mawps", [example.target], [example])
        assert all(result[f"exact_match_{name}"]["correct"] == 1 for name in EXTRACTIONS)

    def test_an_equation_that_misses_an_integer_by_little_is_for_evaluation_only(self):
        parsed = mawps.parse(rows(self.row(equation="x=1000+1", ans=1000), self.row(equation="x=6667*0.3", ans=2000)))
        assert parsed.eval_only == {"f:1"}

    def test_row_whose_equation_is_wrong_is_for_evaluation_only(self):
        parsed = mawps.parse(rows(self.row(), self.row(equation="x=40/7", ans=5.0), self.row(equation="X=0.3=0.2")))
        assert parsed.eval_only == {"f:2", "f:3"}
        assert parsed.examples[1].target == "#### 5"
        assert any("2 rows with an equation" in note and "f:2, f:3" in note for note in parsed.notes)

    def test_row_without_a_number_is_dropped_and_reported(self):
        parsed = mawps.parse(rows(self.row(), self.row(ans="many"), self.row(ans=None)))
        assert [e.id for e in parsed.examples] == ["f:1"]
        assert any("2 rows without a number as answer dropped (f:2, f:3)" in note for note in parsed.notes)

    @pytest.mark.parametrize(
        "fields",
        [
            {"question": "q", "chain": "", "result": "1_000", "expression": "2000/2"},
            {"question": "q", "result": "1_000", "chain": '<gadget id="calculator">2_000 / 2</gadget>\n<output>1_000'},
            {"Question": "q", "Equation": "N_00 / N_01", "Answer": 1000.0, "Numbers": "2000.0 2.0"},
            {"sQuestion": "q", "lEquations": ["X=(2000.0/2.0)"], "lSolutions": [1000.0]},
        ],
    )
    def test_known_copies_of_the_data(self, fields):
        assert mawps.recognises(fields)
        example = mawps.parse(rows(fields)).examples[0]
        assert (example.target, example.answer) == ("2000 / 2 = 1000\n#### 1000", "1000")

    def test_chain_of_several_steps(self):
        chain = "<gadget id='calculator'>3 + 4</gadget><output>7</output><gadget>7 * 2</gadget><output>14</output>"
        parsed = mawps.parse(rows({"question": "q", "chain": chain, "result_float": 14.0}))
        assert parsed.examples[0].target == "3 + 4 = 7\n7 * 2 = 14\n#### 14"

    def test_blanks_are_filled_in_the_question(self):
        fields = {"Question": "She has N_00 and N_01 .", "Equation": "N_00 + N_01", "Answer": 5.5, "Numbers": "2.0 3.5"}
        assert question(mawps.parse(rows(fields)).examples[0]) == "She has 2 and 3.5."

    def test_blanks_without_numbers_name_the_line(self):
        fields = {"Question": "She has N_00 .", "Equation": "N_00", "Answer": 5, "Numbers": "five"}
        with pytest.raises(OptionError, match=r"numbers for the blanks.*line 1"):
            mawps.parse(rows(fields))

    def test_missing_equation_names_the_line(self):
        with pytest.raises(OptionError, match=r"'equation' of line 1"):
            mawps.parse(rows({"original_text": "q", "ans": 1}))

    @pytest.mark.parametrize(
        ("apart", "joined"),
        [
            ("Dan 's cat did n't eat .  It slept .", "Dan's cat didn't eat. It slept."),
            ("It costs $ 7 , or 10 % more ?", "It costs $7, or 10% more?"),
            (
                "a T - shirt and 5 - 3 and a 30-mile - per - hour wind",
                "a T-shirt and 5 - 3 and a 30-mile-per-hour wind",
            ),
            ("Jane ’s pens ( 3 ) cost .5 each", "Jane’s pens (3) cost .5 each"),
        ],
    )
    def test_joining_tokens(self, apart, joined):
        assert mawps.join_tokens(apart) == joined


class TestSft:
    chat = (
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello."},
        {"role": "user", "content": "Bye"},
        {"role": "assistant", "content": " Bye!\n"},
    )

    def test_last_assistant_turn_is_the_target(self):
        example = sft.parse(rows({"messages": list(self.chat)})).examples[0]
        assert example.messages == self.chat[:4]
        assert example.target == " Bye!\n"
        assert example.answer is None

    def test_turns_after_the_last_answer_are_cut_and_counted(self):
        parsed = sft.parse(rows({"messages": list(self.chat[:4])}))
        assert parsed.examples[0].messages == self.chat[:2]
        assert parsed.examples[0].target == "Hello."
        assert parsed.notes == ["1 chat cut after the assistant's last turn"]

    @pytest.mark.parametrize(
        "fields",
        [
            {"prompt": "Hi", "completion": "Hello."},
            {"prompt": [{"role": "user", "content": "Hi"}], "completion": [{"role": "assistant", "content": "Hello."}]},
            {"messages": json.dumps([{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}])},
            {"messages": None, "prompt": "Hi", "completion": "Hello."},
        ],
    )
    def test_forms_of_a_pair(self, fields):
        assert sft.recognises(fields)
        example = sft.parse(rows(fields)).examples[0]
        assert example.messages == ({"role": "user", "content": "Hi"},)
        assert example.target == "Hello."

    def test_text_that_looks_like_a_list_stays_text(self):
        example = sft.parse(rows({"prompt": "[1, 2] reversed?", "completion": "[2, 1]"})).examples[0]
        assert question(example) == "[1, 2] reversed?"
        assert example.target == "[2, 1]"

    @pytest.mark.parametrize(
        ("fields", "said"),
        [
            ({"messages": []}, "a list of turns in field 'messages'"),
            ({"messages": "Hi"}, "a list of turns in field 'messages'"),
            ({"messages": [{"role": "user", "content": "Hi"}]}, "one turn of the assistant"),
            ({"messages": [{"role": "assistant", "content": "Hi"}]}, "a user's turn before the answer"),
            ({"messages": [{"role": "robot", "content": "Hi"}]}, "'role' (one of system, user, assistant)"),
            ({"messages": [{"role": "user", "text": "Hi"}]}, "'content' (a text)"),
            ({"prompt": "Hi"}, "field 'completion' of line 1"),
            ({"prompt": "Hi", "completion": " "}, "a text in field 'completion'"),
            ({"prompt": "", "completion": "a"}, "a text in field 'prompt'"),
            ({"prompt": "Hi", "completion": [{"role": "user", "content": "Hi"}]}, "one turn of the assistant"),
        ],
    )
    def test_bad_rows_name_line_and_field(self, fields, said):
        with pytest.raises(OptionError) as error:
            sft.parse(rows(fields))
        assert said in str(error.value)
        assert "line 1" in str(error.value)
