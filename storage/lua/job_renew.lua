-- Hold claimed jobs for longer, and tell their owner what is wanted of it.
--
-- KEYS[1]  prefix of the farm's keys
-- ARGV[1]  milliseconds from now
-- ARGV[2…] job ID and fence, in turns
-- return   a list of 'held', 'cancel' (somebody asked for it), 'abandoned' (its driver is gone) or 'lost' (it has
--          ended, is unknown or another's: not renewed)
-- A claim that has lapsed is as good as before as long as nobody else has made one.
-- include: time
-- include: job
local prefix, now, told = KEYS[1], now_ms(), {}
for i = 2, #ARGV, 2 do
  local id, answer = ARGV[i], 'lost'
  local fields = redis.call('HMGET', job_key(prefix, id), 'fence', 'state', 'cancel')
  if fields[1] == ARGV[i + 1] and not ENDS[fields[2]] then
    redis.call('ZADD', held_key(prefix), now + tonumber(ARGV[1]), id)
    if fields[3] == '1' then
      answer = 'cancel'
    elseif job_is_abandoned(prefix, id, now) then
      answer = 'abandoned'
    else
      answer = 'held'
    end
  end
  told[#told + 1] = answer
end
return told
