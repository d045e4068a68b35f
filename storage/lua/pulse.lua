-- Tell that the farm can speak to this server. Where it could not for a while, what had not lapsed by then lives as
-- much longer.
--
-- KEYS[1] prefix of the farm's keys
-- return  milliseconds that were made good
-- Safe to repeat: the second finds nothing missed.
-- include: time
-- include: lapse
local prefix = KEYS[1]
local now = now_ms()
local stood_ms = now - lapse_ms(prefix, now)
redis.call('SET', prefix .. ':pulse', now)
if stood_ms > 0 then
  for _, key in ipairs({prefix .. ':leases', prefix .. ':jobs:attended'}) do
    for _, id in ipairs(redis.call('ZRANGEBYSCORE', key, '(' .. (now - stood_ms), '(inf')) do
      redis.call('ZINCRBY', key, stood_ms, id)
    end
  end
end
return stood_ms
