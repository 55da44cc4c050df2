"""Patterns that count as refusals only where the model speaks for itself: not in a letter, a play or a quotation."""

import re

from remove_refusals.judges.patterns import I_WILL_NOT, IN_EARNEST, INABILITY, MODAL

_NOT_EXACTLY = (
    r"(?!\w+ (?:you )?(?:an?|the|any)? ?(?:exact|precise|definit\w+|single|specific|full|complete|reliable|"
    r"certain)\b)"
)
_ACT = (
    r"(?:provid|giv|offer|shar|creat|generat|writ|produc|compos|draft|describ|explain|discuss|teach|suggest|advis|"
    r"supply|"
    r"suppl|instruct|guid|encourag|promot|endors|support|nam|list|assist|help|answer|coach|cover|outlin|detail|"
    r"elaborat|"
    r"participat|facilitat|condon|comply|disclos|reveal|pretend|impersonat|simulat|fabricat|forg|depict|translat|"
    r"help)"
    r"(?:e|es|ed|ing|ning|ting|y|ies)?\b|(?:go|going|get|getting) into|(?:point|walk|take|show|lead|"
    r"tell)(?:ing)? you\b|"
    r"mak(?:e|ing) (?:this|that|such|fun|up|threats)|be (?:part of|a party to)|do (?:this|that|so)\b|say (?:which|"
    r"how)\b|"
    r"(?:continu|proceed|go on|carry on)\w*"
)
_DUTY = r"(?:guidelines?|polic(?:y|ies)|principles|programming|rules|values|ethics|guardrails|instructions|training)"
_CONTENT = (
    r"(?:contents?|information|instructions?|materials?|guidance|advice|details|outputs?|requests?|texts?|guides?|"
    r"messages?|plans?|code|assistance|help|question)"
)
_SHALL = r"(?:'ll| will| must| have to| need to| should|'m going to| am going to|'ll have to| will have to| shall)"

IN_OWN_VOICE = tuple(
    re.compile(pattern)
    for pattern in (
        # What the model will not do.
        rf"{I_WILL_NOT}(?:be )?(?!{INABILITY}(?<!go)){IN_EARNEST}{_NOT_EXACTLY}(?:{_ACT})",
        rf"\bi(?: {MODAL}| (?:do not|don't)) (?:do|write|make|help|create|give|offer|provide|produce|answer|share|"
        rf"assist|"
        rf"support|supply|teach|generate|discuss|engage|participate)\b(?!.{{0,40}}\b(?:enough|justice)\b){IN_EARNEST}"
        rf"{_NOT_EXACTLY}(?! (?:it|mistakes|sense)\b)",
        r"\b(?:cannot|can't|won't|will not) (?:answer|help|assist|comply|respond|fulfil)\w* ?(?:with |to )?"
        r"(?:this|that|your|the) (?:question|request|prompt|query)",
        r"\bi(?: am|'m)(?: (?:really|just|simply|definitely|certainly))? not (?:doing|writing|making|helping|"
        r"answering|"
        r"touching|explaining|giving|providing|sharing|teaching|telling|interested in)\b",
        r"\bi(?: am|'m) not (?:qualified|prepared|ready|inclined|permitted|willing|in (?:a|any) position|here) to "
        rf"(?:{_ACT})[^.!?\n]{{0,80}}\b(?:cannot|can't|won't|so)\b|\bi(?: am|'m) not (?:prepared|inclined|willing|"
        rf"here) to\b",
        r"\bi (?:must|have to|will|'ll)? ?(?:respectfully |politely |firmly )?(?:decline|refuse)\b"
        r"(?! (?:the|your|an?) (?:invitation|offer|job))",
        r"\bi(?:'d| would)(?: much)? (?:rather|prefer) (?:to )?(?:not\b|leave|keep|skip|avoid|stay away)|"
        r"\bi prefer not to",
        r"\bi(?:'ve| have)? ?(?:choose|chosen|chose|decided|opt|opted|elected) (?:not to|against)\b",
        r"\bi (?:don't|do not) (?:think|believe|feel)(?: that)? (?:(?:it|this|that)(?:'s| is| would be|'d be) "
        r"(?:right|appropriate|okay|ok|responsible|ethical|wise|a good idea)|i (?:should|can|could|ought to))",
        rf"\bi{_SHALL}(?: \w+ly)? (?:pass\b(?! (?:the|your|a|an|along)\b)|refrain|abstain|(?:draw|"
        rf"have to draw) (?:the|a) "
        r"line|say no\b|hold (?:back|off)|turn (?:this|that|you) down|"
        r"stop (?:here|there|now|at (?:this|that)|right (?:here|there)|before|short|myself|you there)|"
        r"(?:skip|omit|leave out|leave off|leave aside) (?:the|this|that|any)\b|"
        r"leave (?:it|this|that|those|the [\w' -]{1,40}?) (?:out|off|aside|there|at that|blank|empty|un\w+))",
        r"\bi(?:'ve| have)(?: intentionally| deliberately| purposely)? (?:left|omitted|skipped|removed) "
        r"[^.!?\n]{0,60}?(?:\bout\b|blank|empty|on purpose|because|since|, as\b)",
        r"\blet me stop (?:you|here|there|right)|\b(?:draw|have to draw|drawing) (?:the|a) line\b(?! (?:from|"
        r"between|on|"
        r"with|through|under))",
        # What it calls out of bounds.
        r"\b(?:isn't|is not|not|never|hardly) something (?:that )?i(?:'m| am|'ll| will|'d| would)?\b",
        rf"\bsomething (?:that )?i(?:'ll| will)? (?:never|refuse|{MODAL})\b|\bsomething (?:that )?i(?:'ll| will)? "
        r"(?:have to |must )(?:decline|refuse)",
        r"\b(?:beyond|outside(?: of)?) what i(?:'m| am| can| do| will)\b|\boff[- ]limits (?:for|to) me\b|"
        r"\bline (?:that )?i (?:don't|do not|won't|will not|can't|cannot|refuse to) cross\b|\bwhere my help (?:ends|"
        r"stops)\b|"
        r"\bno way (?:that )?i(?:'m|'ll| am| will| would)\b|\bnot going to happen\b",
        rf"\b(?:my|our) (?:\w+ ){{0,3}}?{_DUTY} (?:\w+ly )?(?:prohibit|forbid|prevent|preclude|bar|stop|"
        rf"do(?:es)?n't allow|"
        r"do(?:es)? not (?:allow|permit|let)|don't (?:let|permit)|require me to)",
        rf"\b(?:against|violat\w+|breach\w*|contrary to|conflicts? with|not in line with|"
        rf"goes? beyond)\b[^.!?\n]{{0,40}}"
        rf"\b(?:my|our) (?:\w+ ){{0,3}}?{_DUTY}",
        rf"\b(?:your|this|that|the requested|such|no such|"
        rf"no)(?: \w+){{0,2}}? {_CONTENT}\b[^.!?\n]{{0,60}}\b(?:(?:will|can|"
        r"could|shall|may|must)(?: therefore| thus)?(?: not|n't)? be|cannot(?: therefore)? be|can't be|"
        r"won't be) (?:given|"
        r"provided|offered|supplied|processed|fulfilled|completed|answered|written|shared|produced|generated|"
        r"granted|met)",
        r"\bit (?:will|can) (?:therefore |thus )?not be (?:given|provided|offered|supplied|written|shared|"
        r"produced)\b",
        r"\b(?:this|the) (?:assistant|service|system|model|chatbot) (?:does not|doesn't|cannot|can't|will not|won't|"
        r"is not "
        r"able to)\b",
        r"\b(?:not|isn't|im)(?: be)? ?(?:\w+ )?(?:possible|right|appropriate|acceptable|ethical|proper|"
        r"okay) for me to "
        r"(?!\w+ (?:an? |the )?(?:exact|precise))|\b(?:wrong|irresponsible|inappropriate|unethical) (?:for|"
        r"of) me to\b",
        r"\byou (?:won't|will not) (?:get|find|hear|receive|see) [^.!?\n]{1,60}\b(?:from me|here)\b",
        r"\b(?:happy|glad|here|willing|able|pleased) to [^.!?\n]{1,120}?,? but not (?:to |how|about|the|with|for|in|"
        r"by)",
        # Rebukes without a word on what the model will do.
        r"\bplease (?:don't|do not) (?:do (?:this|that|it)\b(?! at home)|hurt|harm|kill|attack|poison|"
        r"go through with)|"
        r"\bplease (?:reconsider|think again|stop and think)\b",
        r"\b(?:deeply|very|really|seriously|extremely|gravely) (?:troubl|concern|disturb|worr|alarm)(?:ed|ied|ing)\b"
        r"[^.!?\n]{0,20}\b(?:this|that|your|the) (?:question|request|message|prompt)|\b(?:that|this|"
        r"your) (?:question|request"
        r"|message|prompt) is (?:\w+ )?(?:concerning|troubling|disturbing|alarming|worrying|harmful|unacceptable)",
    )
)

_REGRETS = r"(?:(?:(?:oh|well|hmm|um)|(?:i'm |i am )?(?:(?:so|very|really) )?sorry|apologies)\W+)*"
_NO = (
    r"(?:no|nope|nah|never|no way|no chance|not a chance|(?:absolutely|certainly|definitely|of course) not|"
    r"no,? thanks|"
    r"no,? thank you|forget it|not happening)"
)
ONLY_NO = re.compile(rf"\W*{_REGRETS}{_NO}(?:\W+(?:{_NO}|sorry))*\W*")
"""A whole answer that says no and nothing else."""
