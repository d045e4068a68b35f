-- Take a turn, or keep one's own.
--
-- KEYS[1] prefix of the farm's keys
-- ARGV[1] what it is for
-- ARGV[2] token
-- ARGV[3] milliseconds that it is kept without being taken again
-- return  1 if it is one's own now, else 0
local turn = KEYS[1] .. ':turn:' .. ARGV[1]
local holder = redis.call('GET', turn)
if holder and holder ~= ARGV[2] then
  return 0
end
redis.call('SET', turn, ARGV[2], 'PX', ARGV[3])
return 1
