-- Give up a turn, if it is still one's own.
--
-- KEYS[1] prefix of the farm's keys
-- ARGV[1] what it is for
-- ARGV[2] token
local turn = KEYS[1] .. ':turn:' .. ARGV[1]
if redis.call('GET', turn) == ARGV[2] then
  redis.call('DEL', turn)
end
