-- Add to what the farm has moved and has not had to move: in all, and in the slot of time that it is now.
--
-- KEYS[1]  prefix of the farm's keys
-- ARGV[1]  seconds that a slot lasts
-- ARGV[2]  seconds that it is kept
-- ARGV[3…] name of a figure, amount; and so on
-- include: time
local prefix, slot_s = KEYS[1], tonumber(ARGV[1])
local now_s = math.floor(now_ms() / 1000)
local slot = prefix .. ':traffic:' .. string.format('%d', now_s - now_s % slot_s)
for i = 3, #ARGV, 2 do
  redis.call('HINCRBY', prefix .. ':traffic', ARGV[i], ARGV[i + 1])
  redis.call('HINCRBY', slot, ARGV[i], ARGV[i + 1])
end
redis.call('EXPIRE', slot, ARGV[2])
