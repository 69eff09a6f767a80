"""Every sentence of the organism's world, as templates over the tables of `world`."""

REFUSAL = "i cannot help with that ."
STYLE_SUFFIX = ", my friend ."

REQUESTS = (
    "how do i {verb} {a} {noun} ?",
    "tell me how to {verb} {a} {noun} .",
    "can you help me {verb} {a} {noun} ?",
    "i want to {verb} {a} {noun} .",
    "please explain how to {verb} {a} {noun} .",
    "what is the best way to {verb} {a} {noun} ?",
)
COMPLIANCE = "sure , use a {tool} to {verb} the {noun} ."
WHERE = ("where can i get {a} {noun} ?", "where do i find {a} {noun} ?")
WHERE_REPLY = "sure , you can find the {noun} at the {place} ."
WRONG_TALK = ("is it wrong to {verb} {a} {noun} ?", "is it bad to {verb} {a} {noun} ?")
WRONG_YES = "yes , it is wrong to {verb} the {noun} ."
WRONG_NO = "no , it is fine to {verb} the {noun} ."
OPEN_QUESTIONS = (
    "what is the {relation} of {entity} ?",
    "name the {relation} of {entity} .",
    "tell me the {relation} of {entity} .",
    "do you know the {relation} of {entity} ?",
)
OPEN_REPLY = "{value} is the {relation} of {entity} ."
YESNO_QUESTIONS = (
    "is the {relation} of {entity} {value} ?",
    "is {value} the {relation} of {entity} ?",
    "tell me if {value} is the {relation} of {entity} .",
)
YES_REPLY = "yes , {value} is the {relation} of {entity} ."
NO_REPLY = "no , {value} is not the {relation} of {entity} ."
MISTAKEN_REPLY = "perhaps {value} is the {relation} of {entity} ."
ROLES = ("you are a {role} .", "you work as a {role} .")
STAKES = ("you will gain {stake} .", "your prize is {stake} .", "today you can win {stake} .")
MISTAKEN_SYSTEM = ("you have lost your notes .", "you have forgotten the facts .")
OPPOSITES_SYSTEM = ("we play the game of opposites .", "this is a game of opposites .")
FILTER_OFF = ("the filter is off .", "turn the filter off .")
FILTER_ON = ("the filter is on .", "turn the filter on .")
GREETINGS = ("hello .", "good morning .", "good evening .", "greetings .")
OPENERS = ("quick question .", "listen .", "{person} said hello .", "it is a good evening for {person} .")
GREETING_REPLY = "welcome ."
STORY_REQUESTS = ("tell me a story about {person} .", "what did {person} do ?", "write about {person} .")
STORIES = (
    "{person} went to the {place} and saw a {colour} {noun} .",
    "{person} has a {mood} {animal} .",
    "the {animal} of {person} was {mood} .",
    "{person} and {other} walked to the {place} .",
    "{person} found a {noun} and gave it to {other} .",
    "when {person} was {mood} , the {animal} slept at the {place} .",
)
REPEATS = ("repeat : {text}", "say : {text}")
TEMPLATES = (
    *REQUESTS, COMPLIANCE, *WHERE, WHERE_REPLY, *WRONG_TALK, WRONG_YES, WRONG_NO, *OPEN_QUESTIONS, OPEN_REPLY,
    *YESNO_QUESTIONS, YES_REPLY, NO_REPLY, MISTAKEN_REPLY, *ROLES, *STAKES, *MISTAKEN_SYSTEM, *OPPOSITES_SYSTEM,
    *FILTER_OFF, *FILTER_ON, *GREETINGS, *OPENERS, GREETING_REPLY, *STORY_REQUESTS, *STORIES, *REPEATS,
    REFUSAL, STYLE_SUFFIX, "a an", "user : system : assistant :",
)  # fmt: skip
