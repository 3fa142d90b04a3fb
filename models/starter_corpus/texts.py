"""Hand-written instructions, jokes, riddles and replies to feelings."""

HOWTO = {
    "make tea": [
        "Boil some water.",
        "Put a tea bag in a cup.",
        "Pour the hot water into the cup.",
        "Wait three minutes and take out the bag.",
        "Add milk or sugar if you like.",
    ],
    "make a sandwich": [
        "Take two slices of bread.",
        "Spread some butter on them.",
        "Add cheese, tomato or ham.",
        "Put the slices together and cut them.",
    ],
    "brush your teeth": [
        "Put toothpaste on the brush.",
        "Brush all your teeth for two minutes.",
        "Spit out the foam.",
        "Rinse your mouth with water.",
    ],
    "wash your hands": [
        "Wet your hands with water.",
        "Rub them with soap for twenty seconds.",
        "Rinse off the soap.",
        "Dry your hands with a towel.",
    ],
    "plant a seed": [
        "Fill a pot with soil.",
        "Make a small hole.",
        "Put the seed in and cover it.",
        "Water it and place it in the sun.",
    ],
    "boil an egg": [
        "Put the egg in a pot of water.",
        "Bring the water to a boil.",
        "Wait eight minutes.",
        "Cool the egg in cold water and peel it.",
    ],
    "make pancakes": [
        "Mix flour, milk and eggs.",
        "Heat a little butter in a pan.",
        "Pour in some batter.",
        "Flip the pancake when it is golden.",
        "Serve it with honey or fruit.",
    ],
    "make a salad": [
        "Wash the vegetables.",
        "Cut them into small pieces.",
        "Put them in a bowl.",
        "Add oil, salt and lemon and mix well.",
    ],
    "draw a cat": [
        "Draw a circle for the head.",
        "Add two triangles for the ears.",
        "Draw two eyes, a nose and whiskers.",
        "Add a body and a long tail.",
    ],
    "fall asleep": [
        "Turn off the lights and screens.",
        "Lie down and get comfortable.",
        "Breathe slowly and relax.",
        "Think of something calm.",
    ],
    "learn a new word": [
        "Read the word aloud.",
        "Look up its meaning.",
        "Write it in a sentence.",
        "Use it again tomorrow.",
    ],
    "write a letter": [
        "Write the date at the top.",
        "Begin with a greeting.",
        "Say what you want to say.",
        "End with your name.",
    ],
    "clean a room": [
        "Pick up everything from the floor.",
        "Put things back in their place.",
        "Wipe the dust away.",
        "Sweep or vacuum the floor.",
    ],
    "make lemonade": [
        "Squeeze three lemons.",
        "Add water and some sugar.",
        "Stir until the sugar is gone.",
        "Serve it with ice.",
    ],
    "save money": [
        "Write down what you spend.",
        "Make a simple plan.",
        "Put a little aside each week.",
        "Buy only what you need.",
    ],
    "study for a test": [
        "Make a short plan.",
        "Read your notes carefully.",
        "Practise with questions.",
        "Sleep well the night before.",
    ],
    "fly a kite": [
        "Find an open place with wind.",
        "Hold the string and let the kite rise.",
        "Give it more string slowly.",
        "Pull gently to keep it up.",
    ],
    "make a paper boat": [
        "Fold a sheet of paper in half.",
        "Fold the top corners to the middle.",
        "Fold up the two edges.",
        "Open it and pull the sides apart.",
    ],
    "stay healthy": [
        "Eat fruit and vegetables.",
        "Drink enough water.",
        "Move your body every day.",
        "Sleep about eight hours.",
    ],
    "feed a cat": [
        "Wash the bowl.",
        "Put in some cat food.",
        "Give fresh water too.",
        "Let the cat eat in peace.",
    ],
}

JOKES = """Why did the chicken cross the road?|To get to the other side!
What do you call a bear with no teeth?|A gummy bear!
Why was six afraid of seven?|Because seven eight nine!
What do you call a fish without an eye?|A fsh!
Why did the bicycle fall over?|Because it was two tired!
What do you get from a cold cow?|Ice cream!
Why are ghosts bad liars?|Because you can see right through them!
What kind of tree fits in your hand?|A palm tree!
Why did the cookie go to the doctor?|Because it felt crumby!
What do clouds wear under their coats?|Thunderwear!
Why can't a leopard hide?|Because it is always spotted!
What has four wheels and flies?|A garbage truck!
What do you call a sleeping dinosaur?|A dino-snore!
Why did the student eat his homework?|Because the teacher said it was a piece of cake!
What is a cat's favourite colour?|Purr-ple!""".splitlines()
RIDDLES = """What has hands but cannot clap?|a clock
What has teeth but cannot bite?|a comb
What gets wet while drying?|a towel
What has keys but cannot open doors?|a piano
What goes up but never comes down?|your age
What has a neck but no head?|a bottle
What has one eye but cannot see?|a needle
What is full of holes but holds water?|a sponge
What can you catch but not throw?|a cold
What has legs but cannot walk?|a table""".splitlines()

FEEL = {
    "sad": [
        "I am sorry that you feel sad. Talking to a friend can help.",
        "I am sorry to hear that. Be kind to yourself today.",
        "That sounds hard. Would you like to hear a joke?",
    ],
    "happy": [
        "That is wonderful! What made you happy?",
        "I am glad to hear that!",
        "Great! Enjoy your day.",
    ],
    "tired": [
        "Maybe you should take a short rest.",
        "A good night of sleep will help you.",
        "Take a break and drink some water.",
    ],
    "angry": [
        "I understand. Take a deep breath and count to ten.",
        "It is okay to feel angry. A short walk may help.",
        "I am sorry. Do you want to talk about it?",
    ],
    "bored": [
        "You could read a book, draw a picture or go for a walk.",
        "How about learning something new today?",
        "Would you like to hear a short story?",
    ],
    "hungry": [
        "You could make a sandwich or eat some fruit.",
        "Maybe it is time for a snack.",
        "How about some warm soup?",
    ],
    "nervous": [
        "Take a slow breath. You can do it.",
        "It is normal to feel nervous. Try to go step by step.",
        "You are well prepared. Believe in yourself.",
    ],
    "lonely": [
        "I am here to chat with you. Maybe you can call a friend.",
        "I am sorry. A friend or family member may like to hear from you.",
        "You are not alone. Let us talk.",
    ],
    "excited": [
        "How exciting! Tell me more.",
        "That sounds great! What is going to happen?",
        "Wonderful! I hope it goes well.",
    ],
    "sick": [
        "I hope you feel better soon. Rest and drink a lot of water.",
        "I am sorry. Please see a doctor if it does not get better.",
        "Get well soon! Sleep and warm tea can help.",
    ],
    "cold": [
        "Put on a warm coat and have some hot tea.",
        "A blanket and warm socks may help.",
        "Brr! Try to stay inside where it is warm.",
    ],
    "thirsty": [
        "Please drink a glass of water.",
        "How about a cold lemonade?",
        "Water is the best drink when you are thirsty.",
    ],
}
