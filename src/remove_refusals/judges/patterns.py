"""What refusals are made of, as patterns; `refusals` says where in an answer each of them counts."""

import re

# Pieces of the patterns below. They are matched against lower-case text with straight quotes, one line a paragraph;
# `[^.!?\n]` therefore stays within a sentence.

_ADVERB = (
    r"(?:,? ?(?:and (?:will|would|should|can)(?: not|n't)|simply|really|ethically|legally|morally|knowingly|directly|"
    r"possibly|just|actually|therefore|also|ever|currently|unfortunately|in good (?:conscience|faith)|"
    r"under any circumstances|as an ai(?: language)?(?: model| assistant)?|respectfully),?)*"
)
MODAL = r"(?:can't|cant|can ?not|(?:won't|will not)(?: be able to)?|shouldn't|should not|mustn't|must not)"
BARRED = (
    r"(?:(?: am|'m)(?: simply| really| just| also)? (?:unable|(?:not|never) (?:able|allowed|permitted|authori[sz]ed|"
    r"willing|going|programmed|designed|equipped|trained|built|in a position)|forbidden|programmed not|designed not) to"
    r"|(?: am|'m) (?:prohibited|restricted|barred) from|(?: do not| don't) have the (?:ability|permission) to)"
)
I_WILL_NOT = rf"\bi(?:{_ADVERB} {MODAL}|{BARRED}){_ADVERB} "

# Talk of what somebody cannot do that is no refusal: figures of speech, reservations before an answer.
IN_EARNEST = (
    r"(?!give (?:up|in|way)\b)"
    r"(?![^.!?\n]*\b(?:enough|without (?:more|further|additional|knowing|seeing|any (?:more|further))))"
    r"(?!\w+ (?:you )?(?:with )?(?:[\w-]+ ){0,3}?(?:(?:medical|legal|financial|tax|investment|professional|"
    r"personali[sz]ed) (?:advice|opinions?|diagnos\w+|counsel|recommendations?|treatment)|"
    r"(?:real-time|live|current|up-to-date|definitive|definite) \w+|guarantees?|personal opinions?)\b)"
)
_HELP = r"(?:help|assist(?:ing)?)(?!\w|\s+(?:but|it|myself|ourselves|wonder|from|\w+ing|think|feel|notice)\b)"
_REFUSED_DEED = (
    rf"(?:{_HELP}|comply|condone|facilitate|accommodate|engage in|be (?:of (?:help|assistance|service)|involved in|"
    r"complicit)|(?:participate in|support|endorse|aid|fulfil\w*|satisfy|honou?r|respond to|act on|go along with|"
    r"(?:continue|proceed)(?: with)?) (?:this|that|such|your|any)\b|do (?:that|this|it) for you)"
)
_DEED = (
    r"(?:provid|giv|offer|shar|creat|generat|writ|produc|mak|compos|draft|develop|design|build|describ|explain|discuss|"
    r"teach|show|tell|suggest|recommend|advis|supply|instruct|guid|encourag|promot|advocat|endors|support|perform|grant|"
    r"carry|execut|complet|disclos|reveal|list|answer|respond|translat|talk|say|speak|engag|process|enabl|depict|fulfil|"
    r"portray|impersonat|pretend|simulat|rol|continu|participat|do\b)\w*"
)
_REQUESTED = (
    r"(?:(?:that|this|such|your|the) (?:a )?(?:request|question|query|prompt|task|topic|kind|type|sort|content|"
    r"material|information|instruction|subject|matter|scenario|activit|behaviou?r)|any (?:kind|type|sort|form|of|such)|"
    r"instructions?|guidance|advice|information|details|assistance|content|step-by-step|tutorial|guides?\b|scripts?\b|"
    r"code\b|requests\b|harm|illegal|unlawful|illicit|criminal|dangerous|unsafe|unethical|immoral|violen|hate|hateful|explicit|"
    r"sexual|discriminat|derogatory|offensive|defam|malicious|malware|fraud|weapons?\b|explosives?\b|drugs?\b|hacking|"
    r"misinformation|disinformation|stereotyp|abus|exploit|deceptive|(?:that|this|it)(?: for you)?(?= ?[.,;!?\n]|$)|"
    r"ways? to|how to)"
)
_TO_DO = (
    r"(?:help|assist|do|provid|support|discuss|engag|writ|creat|generat|shar|answer|offer|participat|giv|explain|"
    r"describ|produc|suggest|comply|fulfil)"
)

ANYWHERE = tuple(
    re.compile(pattern)
    for pattern in (
        rf"{I_WILL_NOT}{IN_EARNEST}{_REFUSED_DEED}",
        rf"{I_WILL_NOT}{IN_EARNEST}{_DEED} [^.!?\n]{{0,120}}?\b{_REQUESTED}",
        rf"\bi (?:do not|don't) {IN_EARNEST}(?:{_HELP}|condone|support|endorse|promote|encourage|provide|create|"
        rf"generate|produce|write|engage in|participate in) [^.!?\n]{{0,80}}?\b{_REQUESTED}",
        r"\bi(?:'ll| will| am going to|'m going to)? (?:must|have to|need to|respectfully|politely)"
        r"(?: respectfully| politely| firmly| also)*,? (?:decline|refuse|say no)\b"
        r"(?! (?:the|your) (?:very |most |kind |generous |gracious |lovely )*(?:invitation|offer|invite|job|position|"
        r"role|proposal|gift))",
        rf"\bi (?:decline|refuse) to {_TO_DO}",
        rf"\bi (?:do not|don't) think (?:that )?i (?:can|should|could) {_TO_DO}",
        rf"\bi(?:'d| would) (?:rather|prefer) not (?:to )?(?:{_TO_DO}|talk about (?:this|that))",
        r"\bi(?:'m| am| do not feel| don't feel)(?: really)? (?:not |un)?comfortable "
        rf"(?:with (?:this|that|your)|(?:with )?{_TO_DO}\w*ing|to {_TO_DO})",
        r"\b(?:not|isn't) something (?:that )?i(?:'m| am|'d)?(?: can| will| could| would| able to| willing to)+ "
        rf"{_TO_DO}",
        rf"\bsomething (?:that )?i(?: {MODAL}|{BARRED}) {_TO_DO}",
        r"\b(?:against|violat\w+|contrary to|conflicts? with|not (?:with)?in(?: line with)?|outside(?: of)?) my "
        r"(?:\w+ ){0,3}?(?:guidelines?|polic(?:y|ies)|programming|safety|terms of)",
        r"\b(?:inappropriate|unethical|irresponsible|illegal|wrong|not (?:\w+ )?(?:appropriate|ethical|possible|okay|"
        rf"right|acceptable|responsible)) for me to {_TO_DO}",
        r"\bi(?: am|'m| was| have been|'ve been) (?:designed|programmed|built|trained|created) (?:not to|to not|"
        r"to avoid|to refuse|to decline)",
    )
)

# What a refusal may begin with, taken off piece by piece; after it, any deed will do.
PREAMBLE = re.compile(
    r"\W+|(?:oh|no|hello|hi|hey|well|okay|unfortunately|regrettably|sadly|however|but|and|that)\b|"
    r"(?:(?:i|we)(?:'m| am|'re| are) )?(?:very |so |really |truly |terribly |deeply )*(?:sorry|afraid)\b|"
    r"(?:i |we )?(?:sincerely |deeply )?apologi[sz]e\b|(?:my )?(?:sincere )?apologies\b|thank you for [^.!?\n,]{1,60}|"
    r"i (?:understand|appreciate|realize|know|see|hear) [^.!?\n,]{1,120},|for (?:any|the) [^.!?\n,]{1,40}|"
    r"(?:as|i'm|i am)(?: just)? an? (?:[\w-]+ ){0,4}?(?:ai|assistant|model|chatbot)\b(?:[^.!?\n,]{0,60},)?"
)
INABILITY = (
    r"(?:access|browse|see|view|open|hear|find|locate|attend|make it|come|join|predict|remember|recall|determine|"
    r"verify|confirm|understand|believe|wait|stop|imagine|think|stress|emphasi[sz]e|thank|express|feel|experience|love|"
    r"eat|drink|taste|have|physically|go|stay|work|read|identify|stand|afford|decide|choose|sleep|be|get|live|play|"
    r"help (?:but|it|\w+ing)|say (?:for|enough|no|it|i|that)|speak for|tell (?:if|whether|the|you how|who|which)|pick|"
    r"sing|dance|watch|listen|recommend (?:it|this|them)|take|keep|let|lie|lose|count|complain|resist)\b"
)
_OBJECT = (
    r"(?:you|your|an?|any|anything|this|that|these|those|such|content|information|instructions|advice|details|code|"
    r"explicit|harmful|hateful|illegal|graphic|sexual|violent)\b"
)
REGRET = re.compile(r"sorry|afraid|apolog|unfortunately|regrettabl|\bai\b|assistant|model")
_WE_WILL_NOT = rf"(?:i|we)(?: {MODAL}|{BARRED}|(?:'re| are) (?:unable|not able) to){_ADVERB} "
REGRETTED_AT_THE_START = re.compile(rf"{_WE_WILL_NOT}(?!{INABILITY}){IN_EARNEST}\w")
AT_THE_START = re.compile(
    rf"{_WE_WILL_NOT}(?!{INABILITY}){IN_EARNEST}(?:{_REFUSED_DEED}|{_DEED}(?: or \w+)? {_OBJECT})|"
    rf"(?:can't|cannot|unable to|not able to|won't) (?:{_HELP}|comply|fulfil|provide|do (?:that|this)|answer)|"
    rf"(?:this|that|your|the) (?:request|question|prompt|content|message) {MODAL} be |"
    r"(?:your )?request (?:has been |was |is )?(?:denied|refused|rejected|declined)\b"
)
