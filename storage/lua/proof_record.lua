-- Record that an identity has read, in a source, what names digests. A proof that holds longer stays.
--
-- KEYS[1]  prefix of the farm's keys
-- ARGV[1]  whose proofs these are: identity and source
-- ARGV[2]  milliseconds that they hold
-- ARGV[3…] digests
-- include: time
local proofs = KEYS[1] .. ':proof:' .. ARGV[1]
local now = now_ms()
redis.call('ZREMRANGEBYSCORE', proofs, '-inf', now)
for i = 3, #ARGV do
  redis.call('ZADD', proofs, 'GT', now + tonumber(ARGV[2]), ARGV[i])
end
local last = redis.call('ZRANGE', proofs, -1, -1, 'WITHSCORES')
if last[2] then
  redis.call('PEXPIREAT', proofs, last[2])
end
